"""One request to `llm`, from tensors to a checked value.

The router works on `LlmRequest` alone. Whatever the tensors hold, the outcome is an `LlmRequest` or a typed
error that names the field. Nothing here knows the model: token ids are checked against the vocabulary, and
lengths against the context, by `preprocess`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np
import numpy.typing as npt

from kelp.core.chat_messages import parse_messages
from kelp.core.errors import InvalidRequest
from kelp.core.messages import SamplingParams
from kelp.core.request_limits import RequestLimits, check_text_bytes
from kelp.core.request_routing import RoutingWishes, read_wishes
from kelp.core.request_sampling import read_sampling
from kelp.core.request_tensors import Array, InputValue, read_inputs
from kelp.core.request_values import NumberRange, read_number

_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """The prompt in the form the client sent it; exactly one field is not empty.

    Attributes:
        messages: JSON, checked by `parse_messages`.
        input_ids: `[num_tokens] int32`, owned by this object.
    """

    text: str = ""
    messages: str = ""
    input_ids: npt.NDArray[np.int32] | None = None

    @property
    def field(self) -> str:
        """The input that carried the prompt."""
        if self.input_ids is not None:
            return "input_ids"
        return "messages" if self.messages else "text_input"


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What the client wants to see in the responses."""

    return_log_probs: bool = False
    exclude_input_in_output: bool = True
    return_finish_reason: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False


@dataclass(frozen=True, slots=True)
class LlmRequest:
    """A checked request.

    Attributes:
        sampling: Without `bad_words_ids`, which `preprocess` adds; of sequence 0.
        num_sequences: Answers to generate; sequence *i* samples with `seed + i` modulo 2**64, as in vLLM.
        bad_words: Text that must not be generated.
        deadline_ms: Counted from arrival; None takes the configured default.
        session_id: Requests of one session like the same worker.
        wishes: Where it wants to be served.
    """

    prompt: Prompt
    sampling: SamplingParams
    num_sequences: int = 1
    stop_words: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    stream: bool = False
    deadline_ms: int | None = None
    priority: int = 0
    cache_salt: str = ""
    session_id: str = ""
    lora_name: str = ""
    output: OutputOptions = OutputOptions()
    wishes: RoutingWishes = field(default_factory=RoutingWishes)


_OUTPUT_FLAGS = tuple(option.name for option in fields(OutputOptions))
_DEFAULT_OUTPUT = OutputOptions()


def _text(inputs: Mapping[str, InputValue], name: str) -> str:
    value = inputs.get(name, "")
    assert isinstance(value, str)
    return value


def _flag(inputs: Mapping[str, InputValue], name: str, default: bool) -> bool:
    value = inputs.get(name, default)
    assert isinstance(value, bool)
    return value


def _name(inputs: Mapping[str, InputValue], name: str, limits: RequestLimits) -> str:
    text = _text(inputs, name)
    check_text_bytes(name, text, limits.max_name_bytes)
    return text


def _read_output(inputs: Mapping[str, InputValue]) -> OutputOptions:
    given = {name: _flag(inputs, name, False) for name in _OUTPUT_FLAGS if name in inputs}
    return replace(_DEFAULT_OUTPUT, **given) if given else _DEFAULT_OUTPUT


def _whole(inputs: Mapping[str, InputValue], name: str, allowed: NumberRange) -> int | None:
    return int(read_number(name, inputs[name], allowed)) if name in inputs else None


def _read_input_ids(inputs: Mapping[str, InputValue]) -> npt.NDArray[np.int32] | None:
    ids = inputs.get("input_ids")
    assert ids is None or isinstance(ids, np.ndarray)
    length = inputs.get("input_lengths")
    num_tokens = 0 if ids is None else len(ids)
    if length is not None and length != num_tokens:
        raise InvalidRequest(f"input_lengths: {length} given, but input_ids has {num_tokens} tokens")
    if ids is None or not num_tokens:
        return None
    negative = np.flatnonzero(ids < 0)
    if negative.size:
        index = int(negative[0])
        raise InvalidRequest(f"input_ids[{index}]: {int(ids[index])} given, must be at least 0")
    ids.setflags(write=False)
    return ids


def _read_prompt(inputs: Mapping[str, InputValue]) -> Prompt:
    prompt = Prompt(_text(inputs, "text_input"), _text(inputs, "messages"), _read_input_ids(inputs))
    given = [
        name
        for name, is_given in (
            ("text_input", bool(prompt.text)),
            ("messages", bool(prompt.messages)),
            ("input_ids", prompt.input_ids is not None),
        )
        if is_given
    ]
    if not given:
        empty = [name for name in ("text_input", "messages", "input_ids") if name in inputs]
        raise InvalidRequest(f"{empty[0] if empty else 'text_input'}: the prompt is empty")
    if len(given) > 1:
        raise InvalidRequest(f"{given[1]}: given beside {given[0]}, a request has one prompt")
    if prompt.messages:
        parse_messages(prompt.messages)
    return prompt


def parse_request(
    tensors: Mapping[str, Array],
    limits: RequestLimits,
    parameters: Mapping[str, object] | None = None,
) -> LlmRequest:
    """Check the inputs of one request to `llm`.

    Args:
        tensors: By input name; BYTES are object arrays of `bytes`.
        limits: What one request may carry.
        parameters: The Triton request's own parameters: routing wishes, and sampling parameters of vLLM clients.

    Raises:
        InvalidRequest: A field is missing, malformed or out of range; names field, value and limit.
        NotSupported: A field asks for something that kelp does not do.
    """
    inputs = read_inputs(tensors, limits)
    prompt = _read_prompt(inputs)
    sampling = read_sampling(inputs, parameters or {}, limits)
    return LlmRequest(
        prompt=prompt,
        sampling=sampling.params,
        num_sequences=sampling.num_sequences,
        stop_words=sampling.stop_words,
        bad_words=sampling.bad_words,
        stream=_flag(inputs, "stream", False),
        deadline_ms=_whole(inputs, "deadline_ms", NumberRange(1, _MAX_INT32, is_integer=True)),
        priority=_whole(inputs, "priority", NumberRange(-(2**31), _MAX_INT32, is_integer=True)) or 0,
        cache_salt=_name(inputs, "cache_salt", limits),
        session_id=_name(inputs, "session_id", limits),
        lora_name=sampling.lora_name,
        wishes=read_wishes(parameters or {}, limits),
        output=_read_output(inputs),
    )
