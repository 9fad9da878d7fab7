"""The bytes of KV events: vLLM's msgpack batches, and our extensions in an element behind them.

A peer's message is untrusted: its size, the numbers of its events and hashes, and every type are limited before
anything is built from it; nothing is unpickled. Events are read as maps (vLLM since 0.11, SGLang) or positional arrays
(older ones). Knows no sockets and no order of messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec

from kelp.core.errors import ProtocolError
from kelp.core.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent
from kelp.core.types import Tier

MAX_BATCH_EVENTS = 1 << 16
MAX_EVENT_HASHES = 1 << 16
MAX_EVENT_TOKENS = 1 << 20
MAX_FOREIGN_HASH_BYTES = 64

_Digest16 = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Medium = Literal["GPU", "CPU", "DISK", "OBJECT"]
_MEDIA: tuple[_Medium, ...] = ("GPU", "CPU", "DISK", "OBJECT")
_TIERS: dict[str | None, Tier] = {medium: Tier(index) for index, medium in enumerate(_MEDIA)}
_FOREIGN_TIERS: dict[str | None, Tier] = {
    **_TIERS,
    None: Tier.DEVICE,
    "CPU_PINNED": Tier.HOST,
    "CPU_TIER1": Tier.HOST,
    "CPU_TIER2": Tier.HOST,
    "STORAGE": Tier.DISK,
    "EXTERNAL": Tier.OBJECT,
}

OpaqueHash = int | Annotated[bytes, msgspec.Meta(max_length=MAX_FOREIGN_HASH_BYTES)]
_OpaqueHashes = Annotated[list[OpaqueHash], msgspec.Meta(max_length=MAX_EVENT_HASHES)]
_OwnHashes = Annotated[tuple[_Digest16, ...], msgspec.Meta(max_length=MAX_EVENT_HASHES)]
_TokenIds = Annotated[
    list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]],
    msgspec.Meta(max_length=MAX_EVENT_TOKENS),
]
_Keys = Annotated[list[msgspec.Raw], msgspec.Meta(max_length=256)]
_ExtraKeys = Annotated[list[_Keys | None], msgspec.Meta(max_length=MAX_EVENT_HASHES)]


class BlockStored(msgspec.Struct, tag=True, gc=False):
    """vLLM's event, the fields that tell which blocks are meant; in the order of the positional form."""

    block_hashes: _OpaqueHashes
    parent_block_hash: OpaqueHash | None
    token_ids: _TokenIds
    block_size: Annotated[int, msgspec.Meta(ge=0, lt=2**16)]
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: _ExtraKeys | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    cache_salt: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, gc=False):
    """vLLM's event."""

    block_hashes: _OpaqueHashes
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, gc=False):
    """vLLM's event."""


class _PositionalStored(BlockStored, tag="BlockStored", array_like=True, gc=False):
    pass


class _PositionalRemoved(BlockRemoved, tag="BlockRemoved", array_like=True, gc=False):
    pass


class _PositionalCleared(AllBlocksCleared, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


class _OwnStored(msgspec.Struct, tag="BlockStored", gc=False):
    block_hashes: _OwnHashes
    parent_block_hash: _Digest16 | None
    token_ids: tuple[()]
    block_size: int
    lora_id: None
    medium: _Medium
    lora_name: None


class _OwnRemoved(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: _OwnHashes
    medium: _Medium


class TierDigest(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One tier's blocks: how many, and the exclusive or of their hashes, which no order changes."""

    num_blocks: Annotated[int, msgspec.Meta(ge=0, lt=2**48)]
    exclusive_or: _Digest16


class DigestExtension(msgspec.Struct, array_like=True, tag="KelpDigest", gc=False):
    """What the publisher holds as of the message's sequence number; the next one comes within `interval_s`."""

    interval_s: Annotated[float, msgspec.Meta(gt=0, le=3600)]
    tiers: Annotated[tuple[TierDigest, ...], msgspec.Meta(min_length=len(Tier), max_length=len(Tier))]


class SnapshotExtension(msgspec.Struct, array_like=True, tag="KelpSnapshot", gc=False):
    """The message is part `number`, from 0, of a snapshot as of its sequence number."""

    number: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    is_last: bool


Extension = DigestExtension | SnapshotExtension
ForeignEvent = BlockStored | BlockRemoved | AllBlocksCleared


class _OwnBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: Annotated[list[_OwnStored | _OwnRemoved | AllBlocksCleared], msgspec.Meta(max_length=MAX_BATCH_EVENTS)]
    data_parallel_rank: int | None = None
    extension: Extension | None = None


class _MapBatch(msgspec.Struct, array_like=True):
    ts: float
    events: Annotated[list[ForeignEvent], msgspec.Meta(max_length=MAX_BATCH_EVENTS)]


class _PositionalBatch(msgspec.Struct, array_like=True):
    ts: float
    events: Annotated[
        list[_PositionalStored | _PositionalRemoved | _PositionalCleared],
        msgspec.Meta(max_length=MAX_BATCH_EVENTS),
    ]


class OwnBatch(msgspec.Struct, frozen=True, gc=False):
    """A message of a kelp worker."""

    ts: float
    events: tuple[KVEvent, ...]
    extension: Extension | None


class ForeignBatch(NamedTuple):
    """A message of another engine; its hashes mean nothing to us (`kv.events.translate`)."""

    ts: float
    events: Sequence[ForeignEvent]


_encoder = msgspec.msgpack.Encoder()
_own_decoder = msgspec.msgpack.Decoder(_OwnBatch)
_map_decoder = msgspec.msgpack.Decoder(_MapBatch)
_positional_decoder = msgspec.msgpack.Decoder(_PositionalBatch)
_text_decoder = msgspec.msgpack.Decoder(str)


def tier_of(medium: str | None) -> Tier | None:
    """Tier of a foreign engine's medium; None for one that we do not know."""
    return _FOREIGN_TIERS.get(medium)


def text_of(key: msgspec.Raw) -> str | None:
    """One of a foreign block's extra keys (LoRA name or cache salt), or None if it is no text."""
    try:
        return _text_decoder.decode(key)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def encode_batch(ts: float, events: Sequence[KVEvent], block_size: int, extension: Extension | None = None) -> bytes:
    """A batch of ours; `ts` in seconds of the wall clock."""
    return _encoder.encode(_OwnBatch(ts, [_wire_event(event, block_size) for event in events], None, extension))


def decode_own(payload: bytes, max_bytes: int) -> OwnBatch:
    """Read a kelp worker's message.

    Raises:
        ProtocolError: It is too large or no such message.
    """
    _check_size(payload, max_bytes)
    batch = _guarded(_own_decoder, payload)
    return OwnBatch(batch.ts, tuple(map(_own_event, batch.events)), batch.extension)


def decode_foreign(payload: bytes, max_bytes: int) -> ForeignBatch:
    """Read another engine's message, maps or positional.

    Raises:
        ProtocolError: It is too large or no such message.
    """
    _check_size(payload, max_bytes)
    try:
        batch: _MapBatch | _PositionalBatch = _guarded(_map_decoder, payload)
    except ProtocolError as as_maps:
        try:
            batch = _guarded(_positional_decoder, payload)
        except ProtocolError:
            raise as_maps from None
    return ForeignBatch(batch.ts, batch.events)


def _wire_event(event: KVEvent, block_size: int) -> _OwnStored | _OwnRemoved | AllBlocksCleared:
    if isinstance(event, BlocksStored):
        return _OwnStored(event.hashes, event.parent, (), block_size, None, _MEDIA[event.tier], None)
    if isinstance(event, BlocksRemoved):
        return _OwnRemoved(event.hashes, _MEDIA[event.tier])
    return AllBlocksCleared()


def _own_event(event: _OwnStored | _OwnRemoved | AllBlocksCleared) -> KVEvent:
    if isinstance(event, AllBlocksCleared):
        return BlocksCleared()
    hashes: tuple[Any, ...] = event.block_hashes
    if not hashes:
        raise ProtocolError("KV event: block_hashes: at least one is required")
    if isinstance(event, _OwnRemoved):
        return BlocksRemoved(hashes, _TIERS[event.medium])
    parent: Any = event.parent_block_hash
    return BlocksStored(hashes, parent, _TIERS[event.medium])


def _check_size(payload: bytes, max_bytes: int) -> None:
    if len(payload) > max_bytes:
        raise ProtocolError(f"KV event message: {len(payload)} bytes exceed events.max_message_bytes={max_bytes}")


MessageT = TypeVar("MessageT")


def _guarded(decoder: msgspec.msgpack.Decoder[MessageT], raw: bytes | msgspec.Raw) -> MessageT:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"KV event message: {error}") from None
