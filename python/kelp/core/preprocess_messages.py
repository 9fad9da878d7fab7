"""What the router and `preprocess` say to each other, and the tensors that carry it.

Both ends use this module, so that no tensor is built or read anywhere else. Knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter

from kelp.core.errors import ProtocolError
from kelp.core.guide_spec import GuideSpec
from kelp.core.request import LlmRequest, Prompt
from kelp.core.request_tensors import Array
from kelp.core.types import SequenceHash
from kelp.core.wire import LoraDigest, Message, decode_message, encode_message

HASH_BYTES = 16
_MAX_REMEMBERED = 1024
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class PreprocessOptions(Message):
    """Router to `preprocess`, beside the prompt.

    Attributes:
        block_size: Tokens per KV block of the workers that will serve the request.
        max_tokens: Counted against the context together with the prompt.
        stop_token_ids: Checked against the vocabulary.
        add_special_tokens: As the model's tokenizer does by default; a chat template brings its own.
        return_prompt_text: Whether the router will show the prompt to the client.
        guide: Compiled to see whether it can be.
    """

    block_size: Annotated[int, Field(ge=1, lt=2**16)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stop_token_ids: tuple[_TokenId, ...] = ()
    bad_words: tuple[str, ...] = ()
    add_special_tokens: bool = True
    lora_name: str = ""
    cache_salt: str = ""
    return_prompt_text: bool = False
    guide: GuideSpec | None = None


class Prepared(Message):
    """`preprocess` to router, beside the tokens.

    Attributes:
        lora_digest: Content of the request's adapter that the hashes stand for; empty without one.
        model_id: The model that the hashes stand for; empty where there is but one.
    """

    seed_hash_hex: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    bad_words_ids: tuple[tuple[_TokenId, ...], ...] = ()
    lora_digest: LoraDigest = ""
    model_id: Annotated[str, Field(max_length=256)] = ""


PREPROCESS_OPTIONS: TypeAdapter[PreprocessOptions] = TypeAdapter(PreprocessOptions)
PREPARED: TypeAdapter[Prepared] = TypeAdapter(Prepared)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPrompt:
    """A prompt ready for routing.

    Attributes:
        input_ids: `[num_tokens] int32`.
        block_hashes: Names of the full blocks, in prompt order.
        prompt_text: The prompt as the model reads it; empty unless asked for.
    """

    input_ids: npt.NDArray[np.int32]
    block_hashes: Sequence[SequenceHash]
    message: Prepared
    prompt_text: str = ""


def options_for(request: LlmRequest, block_size: int) -> PreprocessOptions:
    """What `preprocess` needs to know of a request."""
    sampling = request.sampling
    has_own = bool(sampling.stop_token_ids or request.bad_words or request.lora_name or request.cache_salt)
    if not has_own and sampling.guide is None:
        return _plain_options(block_size, sampling.max_tokens, not request.output.exclude_input_in_output)
    return PreprocessOptions(
        block_size=block_size,
        max_tokens=request.sampling.max_tokens,
        stop_token_ids=request.sampling.stop_token_ids,
        bad_words=request.bad_words,
        lora_name=request.lora_name,
        cache_salt=request.cache_salt,
        return_prompt_text=not request.output.exclude_input_in_output,
        guide=request.sampling.guide,
    )


@lru_cache(_MAX_REMEMBERED)
def _plain_options(block_size: int, max_tokens: int, return_prompt_text: bool) -> PreprocessOptions:
    return PreprocessOptions(block_size=block_size, max_tokens=max_tokens, return_prompt_text=return_prompt_text)


def _bytes_tensor(raw: bytes) -> Array:
    return np.array([raw], dtype=np.object_)


def _read_bytes(tensors: Mapping[str, Array], name: str) -> bytes:
    array = tensors.get(name)
    if array is None or array.dtype != object or array.size != 1 or not isinstance(array.flat[0], bytes):
        raise ProtocolError(f"{name}: must be one BYTES element")
    return array.flat[0]


def _read_text(tensors: Mapping[str, Array], name: str) -> str:
    if name not in tensors:
        return ""
    try:
        return _read_bytes(tensors, name).decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"{name}: invalid UTF-8 at byte {error.start}") from None


def _read_vector(tensors: Mapping[str, Array], name: str, dtype: type[np.generic]) -> Array:
    array = tensors.get(name)
    if array is None or array.dtype != np.dtype(dtype) or array.ndim != 1:
        raise ProtocolError(f"{name}: must be a vector of {np.dtype(dtype).name}")
    return array


def encode_preprocess_request(prompt: Prompt, options: PreprocessOptions) -> dict[str, Array]:
    """Inputs of `preprocess`."""
    tensors = {"options": _bytes_tensor(encode_message(options))}
    if prompt.input_ids is not None:
        tensors["input_ids"] = prompt.input_ids
    elif prompt.messages:
        tensors["messages"] = _bytes_tensor(prompt.messages.encode())
    else:
        tensors["text_input"] = _bytes_tensor(prompt.text.encode())
    return tensors


def decode_preprocess_request(tensors: Mapping[str, Array]) -> tuple[Prompt, PreprocessOptions]:
    """Read the inputs of `preprocess`.

    Raises:
        ProtocolError: They are not what `encode_preprocess_request` makes.
    """
    options = decode_message(PREPROCESS_OPTIONS, _read_bytes(tensors, "options"), "options")
    ids = _read_vector(tensors, "input_ids", np.int32) if "input_ids" in tensors else None
    prompt = Prompt(_read_text(tensors, "text_input"), _read_text(tensors, "messages"), ids)
    return prompt, options


def encode_prepared(prepared: PreparedPrompt) -> dict[str, Array]:
    """Outputs of `preprocess`."""
    return {
        "input_ids": prepared.input_ids,
        "block_hashes": np.frombuffer(b"".join(prepared.block_hashes), dtype=np.uint8),
        "prompt_text": _bytes_tensor(prepared.prompt_text.encode()),
        "prepared": _bytes_tensor(encode_message(prepared.message)),
    }


def decode_prepared(tensors: Mapping[str, Array]) -> PreparedPrompt:
    """Read the outputs of `preprocess`; the arrays are copied out of Triton's memory.

    Raises:
        ProtocolError: They are not what `encode_prepared` makes.
    """
    hashes = _read_vector(tensors, "block_hashes", np.uint8).tobytes()
    if len(hashes) % HASH_BYTES:
        raise ProtocolError(f"block_hashes: {len(hashes)} bytes are not whole hashes of {HASH_BYTES}")
    return PreparedPrompt(
        input_ids=_read_vector(tensors, "input_ids", np.int32).copy(),
        block_hashes=[SequenceHash(hashes[start : start + HASH_BYTES]) for start in range(0, len(hashes), HASH_BYTES)],
        message=decode_message(PREPARED, _read_bytes(tensors, "prepared"), "prepared"),
        prompt_text=_read_text(tensors, "prompt_text"),
    )
