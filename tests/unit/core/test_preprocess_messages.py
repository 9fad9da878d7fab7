"""Router and preprocess understand each other's tensors, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from kelp.core.errors import ProtocolError
from kelp.core.messages import SamplingParams
from kelp.core.preprocess_messages import (
    Prepared,
    PreparedPrompt,
    PreprocessOptions,
    decode_prepared,
    decode_preprocess_request,
    encode_prepared,
    encode_preprocess_request,
    options_for,
)
from kelp.core.request import LlmRequest, OutputOptions, Prompt
from kelp.core.schema import PREPROCESS

OPTIONS = PreprocessOptions(block_size=16, max_tokens=4, bad_words=("x",), cache_salt="s")


@pytest.mark.parametrize(
    "prompt",
    [Prompt(text="Grüße"), Prompt(messages="[1]"), Prompt(input_ids=np.array([1, 2], dtype=np.int32))],
    ids=["text", "messages", "ids"],
)
def test_a_prompt_of_any_form_arrives_as_sent(prompt):
    tensors = encode_preprocess_request(prompt, OPTIONS)
    assert set(tensors) <= {spec.name for spec in PREPROCESS.inputs}
    arrived, options = decode_preprocess_request(tensors)
    assert (arrived.text, arrived.messages, arrived.field) == (prompt.text, prompt.messages, prompt.field)
    if prompt.input_ids is not None:
        np.testing.assert_array_equal(arrived.input_ids, prompt.input_ids)
    assert options == OPTIONS


def test_a_prepared_prompt_arrives_as_sent():
    prepared = PreparedPrompt(
        input_ids=np.array([5, 6], dtype=np.int32),
        block_hashes=[bytes(range(16)), bytes(range(16, 32))],
        message=Prepared(seed_hash_hex="0f" * 16, bad_words_ids=((1, 2), (3,)), lora_digest="f0" * 16),
        prompt_text="Grüße",
    )
    tensors = encode_prepared(prepared)
    assert set(tensors) == {spec.name for spec in PREPROCESS.outputs}
    arrived = decode_prepared(tensors)
    assert (arrived.message, arrived.prompt_text) == (prepared.message, "Grüße")
    assert arrived.input_ids.tolist() == [5, 6]
    assert arrived.block_hashes == [bytes(range(16)), bytes(range(16, 32))]


def test_the_tensors_have_the_types_of_the_schema():
    message = Prepared(seed_hash_hex="0f" * 16)
    tensors = encode_prepared(PreparedPrompt(np.zeros(1, np.int32), [], message))
    assert {name: array.dtype for name, array in tensors.items()} == {
        spec.name: spec.datatype.numpy for spec in PREPROCESS.outputs
    }


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("block_hashes", np.zeros(15, dtype=np.uint8)),
        ("block_hashes", np.zeros(16, dtype=np.int32)),
        ("input_ids", np.zeros((1, 2), dtype=np.int32)),
        ("prepared", np.array([b"{}"], dtype=object)),
        ("prepared", np.array([b"{", b"}"], dtype=object)),
        ("prompt_text", np.array([b"\xff"], dtype=object)),
    ],
)
def test_a_malformed_answer_is_a_protocol_error_that_names_the_tensor(name, array):
    message = Prepared(seed_hash_hex="0f" * 16)
    tensors = encode_prepared(PreparedPrompt(np.zeros(1, np.int32), [], message))
    with pytest.raises(ProtocolError) as caught:
        decode_prepared({**tensors, name: array})
    assert caught.value.text.startswith(name)


def test_a_request_without_options_is_a_protocol_error():
    with pytest.raises(ProtocolError, match="options"):
        decode_preprocess_request({})


def test_options_say_what_the_request_needs():
    request = LlmRequest(
        prompt=Prompt(text="a"),
        sampling=SamplingParams(max_tokens=9, stop_token_ids=(2,)),
        bad_words=("x",),
        lora_name="sql",
        cache_salt="s",
        output=OutputOptions(exclude_input_in_output=False),
    )
    assert options_for(request, block_size=8) == PreprocessOptions(
        block_size=8,
        max_tokens=9,
        stop_token_ids=(2,),
        bad_words=("x",),
        lora_name="sql",
        cache_salt="s",
        return_prompt_text=True,
    )
