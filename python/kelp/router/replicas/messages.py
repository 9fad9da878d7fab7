"""What routers of one deployment tell each other; msgpack, typed and bounded like everything that crosses a wire."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from kelp.core.errors import ProtocolError

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
MAX_ENTRIES = 1 << 17
"""In one message: what fits into these bytes."""

_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
_Key = tuple[_Id, _Id]
_Few = msgspec.Meta(max_length=MAX_ENTRIES)


class ActiveLoad(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request that a router has on workers.

    Attributes:
        decode: Id and epoch of the decode (or aggregated) worker.
        prefill: The same of the prefill worker, if there is one.
        kv_tokens: Tokens of KV that it holds on each of them.
        work: `timing.rates.Work` of its prompt.
        is_prefilled: Whether its first token has come.
    """

    request_id: _Id
    decode: _Key
    prefill: _Key | None = None
    kv_tokens: _Count = 0
    work: tuple[_Amount, _Amount, _Amount, _Amount, _Amount] = (0.0, 0.0, 0.0, 0.0, 0.0)
    is_prefilled: bool = False


class Add(msgspec.Struct, frozen=True, tag="add", forbid_unknown_fields=True):
    """A request has been placed."""

    load: ActiveLoad


class PrefillDone(msgspec.Struct, frozen=True, tag="prefilled", forbid_unknown_fields=True):
    """Its first token came."""

    request_id: _Id


class Free(msgspec.Struct, frozen=True, tag="free", forbid_unknown_fields=True):
    """Nothing of it runs any more."""

    request_id: _Id


class Renew(msgspec.Struct, frozen=True, tag="renew", forbid_unknown_fields=True):
    """These still run."""

    request_ids: Annotated[tuple[_Id, ...], _Few]


Delta = Add | PrefillDone | Free | Renew


class Deltas(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What changed since the message before; an empty one is a heartbeat and takes a number as well.

    Attributes:
        epoch: When the router started, wall-clock nanoseconds: a greater one is a later incarnation.
        seq: 1, 2, 3 and so on within an epoch.
    """

    router_id: _Id
    epoch: _Number
    seq: _Number
    deltas: Annotated[tuple[Delta, ...], _Few]


class Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a router has under way, as of its message `seq`."""

    router_id: _Id
    epoch: _Number
    seq: _Number
    loads: Annotated[tuple[ActiveLoad, ...], _Few]


MessageT = TypeVar("MessageT")


def decode(kind: type[MessageT], raw: bytes) -> MessageT:
    """Read one message.

    Raises:
        ProtocolError: It is not one, or out of bounds.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{kind.__name__} of another router: {len(raw)} bytes, the limit is {MAX_MESSAGE_BYTES}")
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{kind.__name__} of another router: {error}") from None


def encode(message: msgspec.Struct) -> bytes:
    """Write one message."""
    return msgspec.msgpack.encode(message)
