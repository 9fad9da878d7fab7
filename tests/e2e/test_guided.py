"""Guided decoding through the whole graph: what comes out parses, wherever it was computed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from support.llm_client import ServedError, http_error, http_post
from support.serving import KelpServer

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 99999999},
        "is_capital": {"type": "boolean"},
        "continent": {"enum": ["Europe", "Asia", "Africa"]},
    },
    "required": ["city", "inhabitants", "is_capital", "continent"],
    "additionalProperties": False,
}
DATE = "[12][0-9]{3}-[01][0-9]-[0-3][0-9]"
CHOICES = ["Berlin", "Bern", "Paris", "Prague"]
TEXT: dict[str, Any] = {"text_input": "Paris, the capital of France, as JSON:", "max_tokens": 200}


@pytest.fixture(params=["disaggregated", "aggregated"])
def either_server(request: pytest.FixtureRequest) -> KelpServer:
    """Prefill and decode apart, then in one worker; quiet again when the test is over."""
    name = "aggregated_server" if request.param == "aggregated" else "server"
    server: KelpServer = request.getfixturevalue(name)
    request.addfinalizer(server.wait_quiet)
    return server


def tensors(kind: str, guide: str) -> dict[str, Any]:
    """A guide as TensorRT-LLM's clients send it."""
    return {"guided_decoding_guide_type": kind, "guided_decoding_guide": guide}


def structured(**guide: Any) -> dict[str, Any]:
    """A guide as vLLM's clients send it."""
    return {"sampling_parameters": json.dumps({"structured_outputs": guide})}


def check_city(text: str) -> None:
    """`text` is what the schema describes."""
    document = json.loads(text)
    assert list(document) == SCHEMA["required"]
    assert len(document["city"]) <= 20
    assert type(document["inhabitants"]) is int and 0 <= document["inhabitants"] <= 99999999
    assert type(document["is_capital"]) is bool
    assert document["continent"] in ("Europe", "Asia", "Africa")


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_schema_shapes_a_streamed_answer(either_server: KelpServer, temperature: float) -> None:
    fields = {**TEXT, "stream": True, "temperature": temperature, "random_seed": 11}
    answer = either_server.ask(**fields, **tensors("json_schema", json.dumps(SCHEMA)))
    assert len(answer.responses) > 1
    assert answer.last.finish_reason == "stop"
    check_city(answer.text)


def test_both_spellings_give_the_same_tokens(either_server: KelpServer) -> None:
    first = either_server.ask(**TEXT, **tensors("json_schema", json.dumps(SCHEMA)))
    second = either_server.ask(**TEXT, **structured(json=SCHEMA))
    assert first.token_ids == second.token_ids


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_regex_ends_the_answer_where_nothing_may_follow(either_server: KelpServer, seed: int) -> None:
    fields = {"text_input": "Today is", "max_tokens": 40, "temperature": 2.0, "ignore_eos": True, "min_tokens": 40}
    answer = either_server.ask(**fields, random_seed=seed, **tensors("regex", DATE))
    assert re.fullmatch(DATE, answer.text)
    assert answer.last.finish_reason == "stop"


def test_every_sequence_of_a_request_makes_its_own_choice(either_server: KelpServer) -> None:
    answer = either_server.ask(
        text_input="A city:", temperature=2.0, random_seed=5, num_return_sequences=4, **structured(choice=CHOICES)
    )
    texts = [bytes(text).decode() for text in answer.last.tensors["text_output"]]
    assert len(texts) == 4 and set(texts) <= set(CHOICES)
    assert answer.last.tensors["finish_reason"].tolist() == [b"stop"] * 4


def test_generate_answers_with_text_that_parses(either_server: KelpServer) -> None:
    url = f"{either_server.http_url}/v2/models/llm/generate"
    for guide in (tensors("json", ""), structured(json=SCHEMA), structured(json_object=True)):
        status, reply = http_post(url, {**TEXT, **guide})
        assert status == 200, reply
        answer = json.loads(reply)
        if answer["finish_reason"] == "stop":
            assert isinstance(json.loads(answer["text_output"]), dict)
        else:
            assert answer["text_output"].lstrip().startswith("{")


def test_max_tokens_may_end_the_answer_before_the_guide_does(either_server: KelpServer) -> None:
    answer = either_server.ask(text_input="Digits:", max_tokens=3, **tensors("regex", "[0-9]{200}"))
    assert (answer.last.finish_reason, len(answer.token_ids)) == ("length", 3)
    assert answer.text.isdigit()


@pytest.mark.parametrize(
    ("guide", "reason"),
    [
        (tensors("json_schema", '{"type": "tree"}'), "Invalid type: tree"),
        (tensors("regex", "["), "unclosed character class"),
        (tensors("regex", ""), "guided_decoding_guide"),
        (structured(json={"type": "array", "uniqueItems": True}), "uniqueItems"),
        (structured(grammar="nonsense"), "grammar"),
        ({**tensors("json", ""), **structured(regex="a")}, "one guide"),
    ],
)
def test_a_bad_guide_is_refused_before_any_work(server: KelpServer, guide: dict[str, Any], reason: str) -> None:
    with pytest.raises(ServedError) as caught:
        server.ask(**TEXT, **guide)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert reason in caught.value.message
    status, reply = http_post(f"{server.http_url}/v2/models/llm/generate", {**TEXT, **guide})
    assert status == 400 and reason in http_error(reply).message
    server.wait_quiet()
