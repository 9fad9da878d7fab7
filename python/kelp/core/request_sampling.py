"""Sampling parameters of a request, gathered from the three places where clients put them.

From weakest to strongest: the request's own parameters (what the vLLM backend reads when there is no
`sampling_parameters` tensor), the single tensors, and the JSON of `sampling_parameters`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from pydantic_core import from_json

from kelp.core.errors import InvalidRequest, NotSupported
from kelp.core.guide_spec import GuideSpec
from kelp.core.messages import SamplingParams
from kelp.core.request_guide import GUIDE_OBJECTS, GUIDE_TENSORS, read_guide
from kelp.core.request_limits import RequestLimits, short_repr
from kelp.core.request_tensors import InputValue
from kelp.core.request_values import (
    Given,
    NumberRange,
    read_bool,
    read_name,
    read_number,
    read_token_ids,
    read_words,
)

_MAX_INT32 = 2**31 - 1
_GREEDY_BELOW = 1e-5
"""As in vLLM: dividing logits by less would only overflow."""

NUMBER_RANGES: dict[str, NumberRange] = {
    "max_tokens": NumberRange(1, _MAX_INT32, is_integer=True),
    "min_tokens": NumberRange(0, _MAX_INT32, is_integer=True),
    "temperature": NumberRange(0, 100),
    "top_p": NumberRange(0, 1),
    "top_k": NumberRange(-1, _MAX_INT32, is_integer=True),
    "min_p": NumberRange(0, 1),
    "repetition_penalty": NumberRange(0, 100, excludes_minimum=True),
    "presence_penalty": NumberRange(-100, 100),
    "frequency_penalty": NumberRange(-100, 100),
    "random_seed": NumberRange(-1, 2**64 - 1, is_integer=True),
    "end_id": NumberRange(-(2**31), _MAX_INT32, is_integer=True),
    "num_return_sequences": NumberRange(1, _MAX_INT32, is_integer=True),
}
_DEFAULTS: dict[str, float] = {
    "max_tokens": 16,
    "min_tokens": 0,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "random_seed": -1,
    "end_id": -1,
    "num_return_sequences": 1,
}
_OTHERS = ("ignore_eos", "stop_words", "bad_words", "stop_token_ids", "lora_name")
_Plain = bool | int | float | str
_PLAIN = frozenset((*NUMBER_RANGES, "ignore_eos"))
_MAX_REMEMBERED = 1024
_SINGLE = frozenset((*NUMBER_RANGES, *_OTHERS, *GUIDE_TENSORS))

VLLM_NAMES: dict[str, str] = {
    "seed": "random_seed",
    "n": "num_return_sequences",
    "stop": "stop_words",
    **{name: name for name in NUMBER_RANGES if name not in ("random_seed", "end_id", "num_return_sequences")},
    **{name: name for name in _OTHERS if name != "stop_words"},
    **{name: name for name in GUIDE_OBJECTS},
}
"""Keys of vLLM's SamplingParams, and the `lora_name` its backend adds, by our names."""

VLLM_NEUTRAL: dict[str, tuple[str, ...]] = {
    "best_of": ("1",),
    "use_beam_search": ("false", "0"),
    "length_penalty": ("0", "0.0", "1", "1.0"),
    "logprobs": ("0",),
    "prompt_logprobs": ("0",),
    "flat_logprobs": ("false",),
    "detokenize": ("true", "1"),
    "skip_special_tokens": ("true", "1"),
    "include_stop_str_in_output": ("false", "0"),
    "truncate_prompt_tokens": ("-1",),
    "logit_bias": ("{}",),
    "allowed_token_ids": ("[]",),
    "logits_processors": ("[]",),
    "extra_args": ("{}",),
}
"""Keys that vLLM knows and kelp does not act upon, with the values (as text) that ask for nothing."""

_VLLM_NO_EFFECT = ("early_stopping", "spaces_between_special_tokens", "output_kind")


@dataclass(frozen=True, slots=True)
class RequestedSampling:
    """What the client asked for; `stop_words` and `bad_words` are text, as only `preprocess` can tokenise."""

    params: SamplingParams
    stop_words: tuple[str, ...]
    bad_words: tuple[str, ...]
    num_sequences: int = 1
    lora_name: str = ""


def _read_vllm(values: Mapping[str, object], where: str, refuse_unknown: bool) -> dict[str, Given]:
    given: dict[str, Given] = {}
    for key, value in values.items():
        field = f"{where}.{short_repr(key)[1:-1]}"
        if value is None or key in _VLLM_NO_EFFECT:
            continue
        if key in VLLM_NAMES:
            given[VLLM_NAMES[key]] = Given(field, value)
        elif key in VLLM_NEUTRAL:
            if str(value).lower() not in VLLM_NEUTRAL[key]:
                raise NotSupported(f"{field}: {short_repr(value)} asks for something this server does not do")
        elif refuse_unknown:
            raise InvalidRequest(f"{field}: no such sampling parameter")
    return given


def _parse_json(text: str) -> Mapping[str, object]:
    if not text:
        return {}
    try:
        document = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"sampling_parameters: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidRequest(f"sampling_parameters: {short_repr(document)} given, must be a JSON object")
    return document


def _gather(inputs: Mapping[str, InputValue], parameters: Mapping[str, object]) -> dict[str, Given]:
    text = inputs.get("sampling_parameters", "")
    assert isinstance(text, str)
    given = {name: Given(name, value) for name, value in inputs.items() if name in _SINGLE}
    if not parameters and not text:
        return given
    # Request parameters may also come from Triton itself or a tracer, so unknown ones are not ours to refuse.
    weakest = _read_vllm(parameters, "parameters", refuse_unknown=False)
    strongest = _read_vllm(_parse_json(text), "sampling_parameters", refuse_unknown=True)
    return {**weakest, **given, **strongest}


def _check_bounds(numbers: Mapping[str, float], given: Mapping[str, Given], limits: RequestLimits) -> None:
    num_sequences = numbers["num_return_sequences"]
    if num_sequences > limits.max_return_sequences:
        field = given["num_return_sequences"].field
        raise InvalidRequest(f"{field}: {num_sequences} exceeds the limit of {limits.max_return_sequences}")
    if numbers["min_tokens"] > numbers["max_tokens"]:
        field = given["min_tokens"].field
        raise InvalidRequest(f"{field}: {numbers['min_tokens']} exceeds max_tokens, {numbers['max_tokens']}")


def _seed(requested: int, temperature: float) -> int:
    if requested >= 0:
        return requested
    return secrets.randbits(64) if temperature > 0 else 0


def _params(
    numbers: Mapping[str, float], stop_token_ids: tuple[int, ...], ignore_eos: bool, guide: GuideSpec | None
) -> SamplingParams:
    temperature = numbers["temperature"] if numbers["temperature"] >= _GREEDY_BELOW else 0.0
    end_id = int(numbers["end_id"])
    return SamplingParams(
        max_tokens=int(numbers["max_tokens"]),
        min_tokens=int(numbers["min_tokens"]),
        temperature=temperature,
        top_p=numbers["top_p"] or 1.0,
        top_k=max(0, int(numbers["top_k"])),
        min_p=numbers["min_p"],
        repetition_penalty=numbers["repetition_penalty"],
        presence_penalty=numbers["presence_penalty"],
        frequency_penalty=numbers["frequency_penalty"],
        seed=_seed(int(numbers["random_seed"]), temperature),
        stop_token_ids=tuple(dict.fromkeys((*stop_token_ids, *([end_id] if end_id >= 0 else [])))),
        ignore_eos=ignore_eos,
        guide=guide,
    )


def read_sampling(
    inputs: Mapping[str, InputValue], parameters: Mapping[str, object], limits: RequestLimits
) -> RequestedSampling:
    """Sampling parameters of one request.

    `top_k` 0 and -1, `top_p` 0 and 1, a negative `end_id` and a seed of -1 mean "not set". Without a seed,
    sampling (`temperature` above 0) gets a random one.

    Args:
        inputs: As `request_tensors.read_inputs` returns them.
        parameters: The Triton request's own parameters; unknown ones are ignored.
        limits: Bounds of lists and words.

    Raises:
        InvalidRequest: A value is malformed or out of range, or a key of `sampling_parameters` is unknown.
        NotSupported: A value asks for something that kelp does not do.
    """
    plain = None if parameters else _plain(inputs)
    return _read(_gather(inputs, parameters), limits) if plain is None else _remembered(limits, *plain)


def _plain(inputs: Mapping[str, InputValue]) -> tuple[_Plain, ...] | None:
    """Names and values in turn, if they are numbers and flags that mean the same each time; else None."""
    found: list[_Plain] = []
    for name, value in inputs.items():
        if name in _PLAIN and isinstance(value, _Plain):
            found += (name, value)
        elif name in _SINGLE or name == "sampling_parameters":
            return None
    draws_a_seed = inputs.get("temperature", 0.0) != 0.0 and inputs.get("random_seed", -1) == -1
    return None if draws_a_seed else tuple(found)


@lru_cache(_MAX_REMEMBERED, typed=True)
def _remembered(limits: RequestLimits, *plain: _Plain) -> RequestedSampling:
    """Clients ask for the same again and again."""
    names = [str(name) for name in plain[::2]]
    return _read({name: Given(name, value) for name, value in zip(names, plain[1::2], strict=True)}, limits)


def _read(given: Mapping[str, Given], limits: RequestLimits) -> RequestedSampling:
    numbers = _DEFAULTS | {
        name: read_number(given[name].field, given[name].value, allowed)
        for name, allowed in NUMBER_RANGES.items()
        if name in given
    }
    _check_bounds(numbers, given, limits)
    unset = Given("", ())
    stop_ids = given.get("stop_token_ids", unset)
    stop = given.get("stop_words", unset)
    bad = given.get("bad_words", unset)
    ignore_eos = given.get("ignore_eos", Given("", False))
    lora_name = given.get("lora_name", Given("", ""))
    return RequestedSampling(
        _params(
            numbers,
            read_token_ids(stop_ids.field, stop_ids.value, limits),
            read_bool(ignore_eos.field, ignore_eos.value),
            read_guide(given),
        ),
        stop_words=read_words(stop.field, stop.value, limits),
        bad_words=read_words(bad.field, bad.value, limits),
        num_sequences=int(numbers["num_return_sequences"]),
        lora_name=read_name(lora_name.field, lora_name.value, limits),
    )
