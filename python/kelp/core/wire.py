"""The base of everything that crosses a process boundary, and how it is written and read.

Unknown keys are refused and every number is bounded: a peer's message is input like a client's. Nothing here is ever
unpickled.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kelp.core.errors import ProtocolError

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
VERSION_NAME = r"^[a-z][a-z0-9]{0,15}$"
VersionName = Annotated[str, Field(pattern=VERSION_NAME)]
"""One of several versions of a model; part of the names of its workers."""
LoraDigest = Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")]
"""`core.model_identity.adapter_digest`; empty without an adapter."""
Nanoseconds = Annotated[int, Field(ge=0, lt=2**63)]


class Message(BaseModel):
    """Base of everything that crosses a process boundary."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=True)


ModelT = TypeVar("ModelT")


def decode_message(adapter: TypeAdapter[ModelT], raw: bytes, what: str) -> ModelT:
    """Parse one wire message.

    Raises:
        ProtocolError: `raw` is too large, not JSON, or not what `adapter` allows; names the field.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{what}: {len(raw)} bytes exceed the limit of {MAX_MESSAGE_BYTES}")
    try:
        return adapter.validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "document"
        raise ProtocolError(f"{what}: {field}: {first['msg']}") from None


def encode_message(message: BaseModel) -> bytes:
    """One wire message as JSON bytes."""
    return message.model_dump_json(exclude_defaults=False).encode()
