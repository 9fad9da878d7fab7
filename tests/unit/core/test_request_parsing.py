"""Tensors become a checked request, or an error that names the field."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kelp.core.errors import InvalidRequest, NotSupported
from kelp.core.request import LlmRequest, OutputOptions, parse_request
from kelp.core.request_limits import RequestLimits
from kelp.core.schema_inputs import LLM_INPUTS_BY_NAME

LIMITS = RequestLimits(max_request_bytes=4096, max_stop_words=4, max_word_bytes=16, max_name_bytes=32)


def _tensor(name, value):
    spec = LLM_INPUTS_BY_NAME[name]
    values = value if isinstance(value, list) else [value]
    if spec.datatype.value == "BYTES":
        values = [item.encode() if isinstance(item, str) else item for item in values]
    array = np.empty(len(values), dtype=spec.datatype.numpy)
    array[:] = values
    return array


def _parse(parameters=None, **values) -> LlmRequest:
    return parse_request({name: _tensor(name, value) for name, value in values.items()}, LIMITS, parameters)


def _refusal(error_type=InvalidRequest, parameters=None, **values) -> str:
    with pytest.raises(error_type) as caught:
        _parse(parameters, **values)
    return caught.value.text


def test_a_text_prompt_alone_takes_every_default():
    request = _parse(text_input="Hello")
    assert (request.prompt.text, request.prompt.field) == ("Hello", "text_input")
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (16, 0.0, 1.0, 0)
    assert (request.stream, request.deadline_ms, request.stop_words) == (False, None, ())
    assert request.output == OutputOptions(exclude_input_in_output=True)


def test_every_field_reaches_the_request():
    request = _parse(
        text_input="Hi", max_tokens=7, min_tokens=2, temperature=0.5, top_p=0.25, top_k=3, min_p=0.125,
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5, random_seed=2**64 - 1, end_id=2,
        ignore_eos=True, stop_words=["a", "b"], bad_words="c", stream=True, return_log_probs=True,
        num_return_sequences=3,
        exclude_input_in_output=False, return_finish_reason=True, return_num_input_tokens=True,
        return_num_output_tokens=True, cache_salt="salt", session_id="me", priority=-3, deadline_ms=1500,
        lora_name="sql",
    )  # fmt: skip
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature, sampling.top_p) == (7, 2, 0.5, 0.25)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (3, 0.125, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.seed) == (0.5, -0.5, 2**64 - 1)
    assert (sampling.stop_token_ids, sampling.ignore_eos, request.num_sequences) == ((2,), True, 3)
    assert (request.stop_words, request.bad_words, request.stream) == (("a", "b"), ("c",), True)
    assert (request.cache_salt, request.session_id, request.lora_name) == ("salt", "me", "sql")
    assert (request.priority, request.deadline_ms) == (-3, 1500)
    assert request.output == OutputOptions(True, False, True, True, True)


def test_token_ids_are_copied_out_of_the_tensor():
    tensor = np.array([1, 2, 3], dtype=np.int32)
    request = parse_request({"input_ids": tensor}, LIMITS)
    tensor[:] = 0
    assert request.prompt.input_ids.tolist() == [1, 2, 3]
    assert request.prompt.field == "input_ids"
    with pytest.raises(ValueError, match="read-only"):
        request.prompt.input_ids[0] = 9


def test_messages_are_kept_as_the_json_that_came():
    text = json.dumps([{"role": "user", "content": "Hi"}])
    assert _parse(messages=text, text_input="").prompt.messages == text


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({}, "text_input"),
        ({"text_input": ""}, "text_input"),
        ({"messages": ""}, "messages"),
        ({"input_ids": []}, "input_ids"),
        ({"text_input": "a", "input_ids": [1]}, "input_ids"),
        ({"text_input": "a", "messages": '[{"role": "user", "content": "b"}]'}, "messages"),
        ({"input_ids": [1, -2]}, "input_ids[1]: -2"),
        ({"input_ids": [1, 2], "input_lengths": 3}, "input_lengths: 3"),
        ({"messages": "[]"}, "messages"),
        ({"messages": "{"}, "messages"),
        ({"text_input": b"ab\xff"}, "text_input: invalid UTF-8 at byte 2"),
        ({"text_input": b"ab\xe4\xbd"}, "text_input: invalid UTF-8"),
    ],
)
def test_a_bad_prompt_is_refused_by_name(values, field):
    assert _refusal(**values).startswith(field)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -1), ("min_tokens", -1), ("min_tokens", 17), ("temperature", -0.5),
        ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", 101.0), ("top_p", -0.1),
        ("top_p", 1.5), ("top_p", float("nan")), ("top_k", -2), ("min_p", 1.5), ("min_p", -1.0),
        ("repetition_penalty", 0.0), ("repetition_penalty", float("-inf")), ("presence_penalty", float("nan")),
        ("frequency_penalty", 1000.0), ("num_return_sequences", 0), ("num_return_sequences", 17),
        ("deadline_ms", 0), ("deadline_ms", -5), ("stop_words", ["a"] * 5), ("bad_words", ["a"] * 5),
        ("stop_words", "x" * 17), ("bad_words", b"\xff"), ("cache_salt", "s" * 33), ("session_id", b"\xc0"),
        ("sampling_parameters", "{"), ("sampling_parameters", "[1]"), ("sampling_parameters", b"\xff{}"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(name, value):
    message = _refusal(text_input="a", **{name: value})
    assert message.startswith(name)


def test_a_refusal_shows_value_and_limit():
    assert _refusal(text_input="a", top_k=-2) == "top_k: -2 given, must be an integer from -1 to 2147483647"
    assert "1.5 given, must be a finite number from 0 to 1" in _refusal(text_input="a", top_p=1.5)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("max_tokens", np.array([1], dtype=np.int64)),
        ("temperature", np.array([1], dtype=np.float64)),
        ("stream", np.array([1], dtype=np.int32)),
        ("text_input", np.array(["a"])),
        ("text_input", np.array([b"a"])),
        ("text_input", np.array(["a"], dtype=object)),
        ("text_input", np.array([None], dtype=object)),
        ("input_ids", np.array([1], dtype=np.int64)),
        ("max_tokens", np.array([1, 2], dtype=np.int32)),
        ("max_tokens", np.array([], dtype=np.int32)),
        ("max_tokens", np.array(1, dtype=np.int32)),
        ("max_tokens", np.array([[1]], dtype=np.int32)),
        ("input_ids", np.array([[1, 2]], dtype=np.int32)),
        ("text_input", np.array([b"a", b"b"], dtype=object)),
        ("stop_words", np.array([[b"a"]], dtype=object)),
    ],
)
def test_a_wrong_type_or_shape_is_refused_by_name(name, array):
    with pytest.raises(InvalidRequest) as caught:
        parse_request({"text_input": _tensor("text_input", "a"), name: array}, LIMITS)
    assert caught.value.text.startswith(f"{name}: ")


def test_an_unknown_input_is_refused():
    with pytest.raises(InvalidRequest, match="max_token'"):
        parse_request({"text_input": _tensor("text_input", "a"), "max_token": np.array([1])}, LIMITS)


def test_a_request_larger_than_the_limit_is_refused_before_it_is_decoded():
    message = _refusal(text_input=b"\xff" * 5000)
    assert message == "text_input: the request's 5004 bytes exceed the limit of 4096"


def test_small_strings_in_great_number_count_as_large():
    assert "exceed the limit of 4096" in _refusal(text_input="a", embedding_bias_words=[""] * 2000)


@pytest.mark.parametrize(
    "values",
    [
        {"stop_words": "", "bad_words": "", "pad_id": 2, "end_id": 2},
        {"stop_words": [], "bad_words": [""]},
        {"beam_width": 1, "length_penalty": 1.0, "return_context_logits": False, "return_perf_metrics": True},
        {"embedding_bias_words": "", "embedding_bias_weights": 1.0, "lora_task_id": 0, "image": []},
        {"guided_decoding_guide_type": "", "guided_decoding_guide": "", "lora_name": ""},
        {"num_return_sequences": 1, "num_draft_tokens": 0, "use_draft_logits": False, "image_url_input": ""},
    ],
)
def test_neutral_values_of_other_backends_change_nothing(values):
    request = _parse(text_input="a", **values)
    assert (request.stop_words, request.bad_words) == ((), ())


def test_an_empty_tensor_of_any_rank_is_neutral():
    tensors = {"text_input": _tensor("text_input", "a"), "lora_weights": np.zeros((0, 0), dtype=np.float16)}
    assert parse_request(tensors, LIMITS).prompt.text == "a"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guided_decoding_guide_type", "structural_tag"),
        ("beam_width", 4), ("length_penalty", 2.0), ("image", "aGk="),
        ("decoder_text_input", "x"), ("return_context_logits", True), ("return_generation_logits", True),
        ("return_logprobs", True), ("return_cumulative_logprob", True), ("embedding_request", "{}"),
        ("embedding_bias_words", "x"), ("lora_task_id", 3), ("prompt_vocab_size", 5), ("num_draft_tokens", 2),
        ("use_draft_logits", True), ("image_url_input", "http://x"), ("context_phase_params", [1, 2]),
        ("draft_input_ids", [1]), ("retention_decode_priority", 90), ("retention_token_range_starts", [0]),
    ],
)  # fmt: skip
def test_what_kelp_does_not_do_is_refused_as_not_supported(name, value):
    assert _refusal(NotSupported, text_input="a", **{name: value}).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("alias", "value", "read"),
    [
        ("request_output_len", 5, lambda request: request.sampling.max_tokens),
        ("min_length", 3, lambda request: request.sampling.min_tokens),
        ("seed", 9, lambda request: request.sampling.seed),
        ("streaming", True, lambda request: request.stream),
    ],
)
def test_an_alias_means_the_input_it_renames(alias, value, read):
    assert read(_parse(text_input="a", **{alias: value})) == value


def test_an_alias_may_repeat_but_not_contradict():
    assert _parse(text_input="a", min_length=3, min_tokens=3).sampling.min_tokens == 3
    assert _refusal(text_input="a", min_length=3, min_tokens=4).startswith("min_length: 3 contradicts min_tokens")
