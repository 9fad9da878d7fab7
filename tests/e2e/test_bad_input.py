"""Bad input of every kind: a typed error that names the field, and the server serves the next request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from support.llm_client import Call, ServedError, http_post
from support.serving import KelpServer

TEXT = {"text_input": "The capital of France is"}


@pytest.fixture(autouse=True)
def _serves_on(server: KelpServer) -> Iterator[None]:
    yield
    assert server.ask(**TEXT, max_tokens=1).text == " Paris"


def refused(server: KelpServer, **fields: Any) -> ServedError:
    with pytest.raises(ServedError) as caught, Call(server.grpc_endpoint, fields) as call:
        call.answer()
    return caught.value


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({}, "INVALID_ARGUMENT", "text_input"),
        ({"text_input": ""}, "INVALID_ARGUMENT", "text_input"),
        ({"text_input": b"\xff\xfe"}, "INVALID_ARGUMENT", "text_input"),
        ({**TEXT, "messages": '[{"role": "user", "content": "Hi"}]'}, "INVALID_ARGUMENT", "messages"),
        ({"messages": "{"}, "INVALID_ARGUMENT", "messages"),
        ({"messages": '[{"role": "user"}]'}, "INVALID_ARGUMENT", "messages"),
        ({"messages": '{"role": "user", "content": "Hi"}'}, "INVALID_ARGUMENT", "messages"),
        ({"input_ids": [-1]}, "INVALID_ARGUMENT", "input_ids"),
        ({"input_ids": [10, 49152]}, "INVALID_ARGUMENT", "input_ids"),
        ({"text_input": "word " * 9000}, "PROMPT_TOO_LONG", "text_input"),
        ({**TEXT, "max_tokens": 0}, "INVALID_ARGUMENT", "max_tokens"),
        ({**TEXT, "max_tokens": -5}, "INVALID_ARGUMENT", "max_tokens"),
        ({**TEXT, "max_tokens": 100_000}, "PROMPT_TOO_LONG", "max_tokens"),
        ({**TEXT, "min_tokens": 9, "max_tokens": 4}, "INVALID_ARGUMENT", "min_tokens"),
        ({**TEXT, "temperature": -0.5}, "INVALID_ARGUMENT", "temperature"),
        ({**TEXT, "temperature": float("nan")}, "INVALID_ARGUMENT", "temperature"),
        ({**TEXT, "temperature": float("inf")}, "INVALID_ARGUMENT", "temperature"),
        ({**TEXT, "top_p": 1.5}, "INVALID_ARGUMENT", "top_p"),
        ({**TEXT, "top_k": -7}, "INVALID_ARGUMENT", "top_k"),
        ({**TEXT, "repetition_penalty": 0.0}, "INVALID_ARGUMENT", "repetition_penalty"),
        ({**TEXT, "deadline_ms": 0}, "INVALID_ARGUMENT", "deadline_ms"),
        ({**TEXT, "stop_words": ["x"] * 1000}, "INVALID_ARGUMENT", "stop_words"),
        ({**TEXT, "stop_words": ["x" * 100_000]}, "INVALID_ARGUMENT", "stop_words"),
        ({**TEXT, "stop_words": [b"\xff"]}, "INVALID_ARGUMENT", "stop_words"),
        ({**TEXT, "sampling_parameters": "not json"}, "INVALID_ARGUMENT", "sampling_parameters"),
        ({**TEXT, "sampling_parameters": '{"temprature": 1}'}, "INVALID_ARGUMENT", "temprature"),
        ({**TEXT, "num_return_sequences": 17}, "INVALID_ARGUMENT", "num_return_sequences"),
        ({**TEXT, "beam_width": 4}, "NOT_SUPPORTED", "beam_width"),
        ({**TEXT, "lora_name": "adapter"}, "INVALID_ARGUMENT", "lora_name"),
        ({**TEXT, "guided_decoding_guide_type": "regex"}, "INVALID_ARGUMENT", "guided_decoding_guide"),
        ({**TEXT, "guided_decoding_guide": "{}"}, "INVALID_ARGUMENT", "guided_decoding_guide"),
        ({**TEXT, "guided_decoding_guide_type": "structural_tag"}, "NOT_SUPPORTED", "guided_decoding_guide_type"),
        ({**TEXT, "image": b"png"}, "NOT_SUPPORTED", "image"),
    ],
)
def test_a_bad_field_is_refused_by_name(server: KelpServer, fields: dict[str, Any], code: str, named: str) -> None:
    error = refused(server, **fields)
    assert (error.code, named in error.message) == (code, True), error.message


@pytest.mark.parametrize(
    ("field", "array"),
    [
        ("max_tokens", np.array([8], dtype=np.int64)),
        ("max_tokens", np.array([8, 9], dtype=np.int32)),
        ("temperature", np.array([1], dtype=np.int32)),
        ("stream", np.array([[True]])),
        ("input_ids", np.array([[1, 2]], dtype=np.int32)),
    ],
)
def test_a_wrong_type_or_shape_is_refused_by_name(server: KelpServer, field: str, array: np.ndarray[Any, Any]) -> None:
    error = refused(server, **(TEXT if field != "input_ids" else {}), **{field: array})
    assert field in error.message


def test_an_unknown_model_is_refused(server: KelpServer) -> None:
    status, body = http_post(f"{server.http_url}/v2/models/nobody/generate", TEXT)
    assert status in (400, 404)
    assert "nobody" in json.loads(body)["error"]


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({**TEXT, "temperature": -1}, "temperature"),
        ({"text_input": ""}, "text_input"),
        ({"messages": "[]"}, "messages"),
        ({**TEXT, "stop_words": ["x"] * 1000}, "stop_words"),
        (b"{not json", ""),
        ({**TEXT, "max_tokens": "many"}, "integer"),
    ],
)
def test_http_gets_the_same_refusals(server: KelpServer, endpoint: str, body: Any, named: str) -> None:
    status, reply = http_post(f"{server.http_url}/v2/models/llm/{endpoint}", body)
    assert status >= 400 or b'"error"' in reply, reply
    assert named in reply.decode()
