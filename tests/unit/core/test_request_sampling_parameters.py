"""vLLM's JSON, single tensors and request parameters make one set of sampling parameters."""

from __future__ import annotations

import json

import pytest

from kelp.core.errors import InvalidRequest, NotSupported
from kelp.core.request_limits import RequestLimits
from kelp.core.request_sampling import read_sampling

LIMITS = RequestLimits(max_stop_words=4, max_word_bytes=16, max_return_sequences=4)


def _read(document=None, parameters=None, **inputs):
    if document is not None:
        inputs["sampling_parameters"] = document if isinstance(document, str) else json.dumps(document)
    return read_sampling(inputs, parameters or {}, LIMITS)


def test_the_stock_vllm_client_sends_numbers_as_text():
    params = _read({"temperature": "0.1", "top_p": "0.95", "max_tokens": "100"}).params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.1, 0.95, 100)


def test_the_json_wins_over_single_fields_and_they_win_over_request_parameters():
    parameters = {"max_tokens": 1, "top_k": 1, "seed": 1}
    params = _read({"max_tokens": 3}, parameters, max_tokens=2, top_k=2).params
    assert (params.max_tokens, params.top_k, params.seed) == (3, 2, 1)


def test_all_of_vllms_names_are_understood():
    requested = _read(
        {
            "n": 1, "best_of": 1, "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.25,
            "temperature": 1, "top_p": 0.5, "top_k": -1, "min_p": 0.5, "seed": 7, "stop": ["a", "b"],
            "stop_token_ids": [3, 4, 3], "bad_words": ["c"], "ignore_eos": True, "max_tokens": 9.0,
            "min_tokens": 1, "logprobs": None, "prompt_logprobs": None, "detokenize": True,
            "skip_special_tokens": True, "spaces_between_special_tokens": False, "truncate_prompt_tokens": None,
            "include_stop_str_in_output": False, "logit_bias": None, "allowed_token_ids": None,
            "use_beam_search": False, "early_stopping": False, "length_penalty": 1.0, "lora_name": None,
        }
    )  # fmt: skip
    params = requested.params
    assert (params.stop_token_ids, params.ignore_eos, params.seed) == ((3, 4), True, 7)
    assert (params.max_tokens, params.min_tokens, params.top_k, params.min_p) == (9, 1, 0, 0.5)
    assert (requested.stop_words, requested.bad_words) == (("a", "b"), ("c",))


@pytest.mark.parametrize("value", [4, "4", 4.0])
def test_n_is_the_number_of_sequences_and_wins_over_the_single_field(value):
    assert _read({"n": value}, num_return_sequences=2).num_sequences == 4


def test_more_sequences_than_allowed_are_refused_with_the_limit():
    with pytest.raises(InvalidRequest, match=r"num_return_sequences: 5 exceeds the limit of 4"):
        _read(num_return_sequences=5)


def test_the_adapter_may_be_named_in_either_place_and_the_json_wins():
    assert _read().lora_name == ""
    assert _read(lora_name="sql").lora_name == "sql"
    assert _read({"lora_name": "chat"}, lora_name="sql").lora_name == "chat"
    assert _read({"lora_name": None}, lora_name="sql").lora_name == "sql"


@pytest.mark.parametrize("value", [3, ["sql"], "x" * 1025])
def test_a_name_that_is_no_text_or_too_long_is_refused(value):
    with pytest.raises(InvalidRequest, match=r"sampling_parameters\.lora_name: "):
        _read({"lora_name": value})


def test_a_single_stop_may_be_plain_text():
    assert _read({"stop": "END"}).stop_words == ("END",)


@pytest.mark.parametrize("key", ["max_tokens", "stop", "stop_token_ids", "seed", "ignore_eos", "temperature"])
def test_null_means_not_set(key):
    assert _read({key: None}).params == _read({}).params


def test_an_unknown_key_is_refused_by_name():
    with pytest.raises(InvalidRequest, match=r"sampling_parameters\.temprature: no such sampling parameter"):
        _read({"temprature": 1})


def test_an_unknown_request_parameter_is_somebody_elses():
    assert _read(parameters={"triton_enable_empty_final_response": True, "traceparent": "00-ab"}).params.seed == 0


@pytest.mark.parametrize(
    "document",
    [
        {"best_of": 2}, {"logprobs": 1}, {"logprobs": -1}, {"prompt_logprobs": 2},
        {"use_beam_search": True}, {"logit_bias": {"1": 2}}, {"allowed_token_ids": [1]},
        {"skip_special_tokens": False}, {"detokenize": False}, {"include_stop_str_in_output": True},
        {"truncate_prompt_tokens": 5}, {"length_penalty": 2.0},
    ],
)  # fmt: skip
def test_what_vllm_knows_and_kelp_does_not_do_is_refused_by_name(document):
    with pytest.raises(NotSupported, match=rf"sampling_parameters\.{next(iter(document))}: "):
        _read(document)


@pytest.mark.parametrize(
    "document",
    [
        {"temperature": "warm"}, {"temperature": "nan"}, {"temperature": "inf"}, {"temperature": True},
        {"temperature": [1]}, {"temperature": -1}, {"temperature": "1_0"}, {"temperature": "9" * 100},
        {"max_tokens": 1.5}, {"max_tokens": "1.5"}, {"max_tokens": 0}, {"max_tokens": 2**31}, {"max_tokens": {}},
        {"seed": 2**64}, {"seed": -2}, {"top_p": 2}, {"stop": 5}, {"stop": [5]}, {"stop": ["a"] * 5},
        {"stop": ["x" * 17]}, {"stop_token_ids": 5}, {"stop_token_ids": [-1]}, {"stop_token_ids": [2**31]},
        {"stop_token_ids": [1, 2, 3, 4, 5]}, {"stop_token_ids": ["a"]}, {"ignore_eos": "perhaps"},
        {"ignore_eos": 2}, {"ignore_eos": []}, {"bad_words": {"a": 1}}, {"min_tokens": 17}, {"n": 0},
        {"n": 5}, {"n": "two"}, {"n": 1.5},
    ],
)  # fmt: skip
def test_a_bad_value_in_the_json_is_refused_by_name(document):
    with pytest.raises(InvalidRequest, match=rf"sampling_parameters\.{next(iter(document))}"):
        _read(document)


@pytest.mark.parametrize(
    "text",
    [
        "{", "nul", "[]", "5", '"a"', '{"temperature": NaN}', '{"temperature": Infinity}', "[" * 100_000,
        '{"a":' * 100_000, '{"stop": "\\ud800"}', '{"temperature": 1e999}', '{"max_tokens": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_json_that_is_none_or_hostile_is_refused(text):
    with pytest.raises(InvalidRequest, match="sampling_parameters"):
        _read(text)


def test_a_lone_surrogate_in_a_request_parameter_is_refused():
    with pytest.raises(InvalidRequest, match=r"parameters\.stop\[0\].*surrogate"):
        _read(parameters={"stop": "\ud800"})


def test_a_refusal_shows_only_a_glimpse_of_the_value():
    with pytest.raises(InvalidRequest) as caught:
        _read({"temperature": "x" * 100_000})
    assert len(caught.value.text) < 250


def test_off_values_of_all_backends_are_off():
    assert _read(top_k=-1).params.top_k == 0
    assert _read(top_p=0.0).params.top_p == 1.0
    assert _read(end_id=-1).params.stop_token_ids == ()
    assert _read({"seed": -1}).params.seed == 0


def test_end_id_joins_the_stop_token_ids():
    assert _read({"stop_token_ids": [5, 2]}, end_id=2).params.stop_token_ids == (5, 2)


def test_a_temperature_too_small_to_divide_by_is_greedy():
    assert _read({"temperature": 1e-30}).params.temperature == 0.0


def test_sampling_without_a_seed_draws_one():
    seeds = {_read(temperature=1.0).params.seed for _ in range(4)}
    assert len(seeds) == 4


def test_greedy_needs_no_seed_and_a_given_seed_is_kept():
    assert _read().params.seed == 0
    assert _read(temperature=1.0, random_seed=5).params.seed == 5
    assert _read(temperature=1.0, random_seed=0).params.seed == 0


def test_the_same_numbers_are_read_once_and_what_only_compares_equal_is_not_the_same():
    assert _read(max_tokens=1, ignore_eos=True) is _read(max_tokens=1, ignore_eos=True)
    assert _read(max_tokens=2, ignore_eos=True).params.max_tokens == 2
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="max_tokens"):
            _read(max_tokens=True, ignore_eos=True)
    with pytest.raises(InvalidRequest, match="num_return_sequences"):
        read_sampling({"num_return_sequences": 4}, {}, RequestLimits(max_return_sequences=3))
    assert _read(num_return_sequences=4).num_sequences == 4
