"""What workers and the KV block manager say to each other.

One call of the model `kv_block_manager` carries a batch of operations and returns a result for each, in order. Bytes of
KV never travel here: the manager READs what a worker stores, a worker READs what it onboards, each into memory of its
own, so an abandoned transfer can never corrupt what somebody else was given.

Storing is two steps, because NIXL does not notice memory that is reused under a READ: `Store` names blocks that the
worker holds still; the manager answers when it has read those it wants; only the worker knows whether it held them all
the time, and says so with `Commit`. Until then nobody is given their content. Onboarding is a lease on slots of the
manager: what a worker has READ counts only if the READ ended before the lease, counted from the sending of the last
answered `Renew`, ran out.

msgspec checks every field and bound while it decodes; nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from kelp.core.errors import ProtocolError
from kelp.core.types import Tier

MAX_BATCH_BYTES = 4 * 1024 * 1024
MAX_BLOCKS = 16384
"""Blocks in one operation."""
_MAX_OPERATIONS = 256

Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
_Parent = Annotated[bytes, Meta(max_length=16)]
_Name = Annotated[str, Meta(min_length=1, max_length=256)]
_Count = Annotated[int, Meta(ge=0, lt=2**31)]
_Address = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Seconds = Annotated[float, Meta(ge=0, le=86400)]
_LeaseId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Metadata = Annotated[bytes, Meta(max_length=1024 * 1024)]
Digests = Annotated[tuple[Digest, ...], Meta(max_length=MAX_BLOCKS)]
_LeaseIds = Annotated[tuple[_LeaseId, ...], Meta(max_length=MAX_BLOCKS)]


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the values inside operations and results."""


class SpaceRecord(_Struct, frozen=True):
    """What must be equal for one party's bytes to mean the same to the other: `core.types.KVLayout` without its size.

    Attributes:
        hash_version: `core.hashing.HASH_VERSION`.
    """

    num_layers: Annotated[int, Meta(ge=1, lt=2**16)]
    num_kv_heads: Annotated[int, Meta(ge=1, lt=2**16)]
    block_size: Annotated[int, Meta(ge=1, lt=2**16)]
    head_dim: Annotated[int, Meta(ge=1, lt=2**16)]
    dtype: _Name
    model_id: _Name
    hash_version: _Count


class PoolRecord(_Struct, frozen=True):
    """Memory that a peer may READ: block *b* is `block_bytes` bytes at `base_address + b * stride_bytes`.

    Attributes:
        agent_metadata: Of the owner's transport agent (`transport.base.Agent.metadata`).
    """

    agent_metadata: _Metadata
    base_address: _Address
    num_blocks: Annotated[int, Meta(ge=1, lt=2**31)]
    block_bytes: Annotated[int, Meta(ge=1, lt=2**31)]
    stride_bytes: Annotated[int, Meta(ge=1, lt=2**31)]
    device: _Name


class OfferedBlock(_Struct, frozen=True, array_like=True):
    """A sealed block that the sender holds still.

    Attributes:
        parent: The block before it in its sequence; empty for the first.
        position: Its index in the sequence: what recomputing it costs grows with it.
        block_id: In the sender's pool.
    """

    sequence_hash: Digest
    parent: _Parent
    position: _Count
    block_id: _Count


class SlotRef(_Struct, frozen=True, array_like=True):
    """A block in the manager's host tier, readable under a lease.

    Attributes:
        checksum: `kv.tiers.records.checksum` of its `block_bytes` bytes.
    """

    slot: _Count
    checksum: Annotated[bytes, Meta(min_length=8, max_length=8)]


class _Operation(_Struct, frozen=True, tag_field="op", tag=str.lower):
    """Base of what a worker asks."""


class _Result(_Struct, frozen=True, tag_field="result", tag=str.lower):
    """Base of what the manager answers."""


class Join(_Operation, frozen=True):
    """First, and again whenever `Unknown` is answered: introduce a worker's pool and get the manager's."""

    worker_id: _Name
    epoch: _Name
    space: SpaceRecord
    pool: PoolRecord


class Joined(_Result, frozen=True):
    """Attributes: `pool` is the host tier; `manager_epoch` names this incarnation; `tiers` are those it has."""

    manager_epoch: _Name
    pool: PoolRecord
    lease_ttl_s: _Seconds
    tiers: Annotated[tuple[Tier, ...], Meta(max_length=len(Tier))]


class Store(_Operation, frozen=True):
    """Keep these blocks of one tenant if they are worth it; answered by `Stored` when the READs have ended.

    Attributes:
        store_id: The worker's own number, new with every `Store`.
        tenant: `core.hashing.tenant_digest` of the cache salt.
        hold_s: How long the worker holds the blocks at least; a READ that takes longer is given up.
    """

    worker_id: _Name
    epoch: _Name
    store_id: _LeaseId
    tenant: Digest
    hold_s: _Seconds
    blocks: Annotated[tuple[OfferedBlock, ...], Meta(min_length=1, max_length=MAX_BLOCKS)]


class Stored(_Result, frozen=True):
    """Attributes: `num_read` blocks were read and wait for `Commit`; `num_known` were there, the rest is not wanted."""

    num_read: _Count
    num_known: _Count


class Commit(_Operation, frozen=True):
    """The blocks of a `Store` were held unchanged until its answer came (or not: `is_valid` False drops them)."""

    worker_id: _Name
    epoch: _Name
    store_id: _LeaseId
    is_valid: bool = True


class Onboard(_Operation, frozen=True):
    """Lease the longest known run of `hashes`, from its start, as far as bringing it pays; lower tiers are promoted.

    Attributes:
        lease_id: The worker's own number, new with every `Onboard`.
        hashes: Consecutive blocks of one prompt; the worker lacks them from the first on.
        first_position: Index of the first in its sequence.
        recompute_s: Predicted time to compute all of `hashes`; 0 if unknown or of no interest: bring all.
        timeout_s: What is not ready by then is not wanted.
    """

    worker_id: _Name
    epoch: _Name
    lease_id: _LeaseId
    hashes: Annotated[tuple[Digest, ...], Meta(min_length=1, max_length=MAX_BLOCKS)]
    first_position: _Count
    recompute_s: _Seconds
    timeout_s: _Seconds


class Leased(_Result, frozen=True):
    """How an onboarding stands; also the answer to `Await`.

    Attributes:
        num_blocks: Leading blocks that will come; may shrink when a lower tier fails. 0: there is no lease.
        ready: Of those asked for, in order, from the first one that the question did not name as known.
        tiers: Where the `num_blocks` blocks were found, as counts by tier.
    """

    num_blocks: _Count
    ready: Annotated[tuple[SlotRef, ...], Meta(max_length=MAX_BLOCKS)]
    tiers: Annotated[tuple[_Count, ...], Meta(min_length=len(Tier), max_length=len(Tier))]


class Await(_Operation, frozen=True):
    """Answered when more than `num_known` leading blocks are ready, or as many as will ever be."""

    worker_id: _Name
    epoch: _Name
    lease_id: _LeaseId
    num_known: _Count


class Renew(_Operation, frozen=True):
    """Extend leases by the ttl; answered with those still alive."""

    worker_id: _Name
    epoch: _Name
    lease_ids: _LeaseIds


class Renewed(_Result, frozen=True):
    """Answer to `Renew`."""

    lease_ids: _LeaseIds


class Release(_Operation, frozen=True):
    """These leases are over: their blocks were read or are not wanted. Unknown ones are ignored.

    Attributes:
        corrupt: Blocks whose checksum was wrong where they were read: the manager drops them.
    """

    worker_id: _Name
    epoch: _Name
    lease_ids: _LeaseIds
    corrupt: Digests = ()


class Pin(_Operation, frozen=True):
    """Keep these blocks in the host tier for a while; 0 seconds unpins. Answered with how many are there."""

    hashes: Digests
    ttl_s: _Seconds


class Clear(_Operation, frozen=True):
    """Really remove a tenant's blocks from every tier (also other hosts' in the object store); None: everybody's."""

    tenant: Digest | None


class GetStats(_Operation, frozen=True):
    """Counts for people and tests."""


class Done(_Result, frozen=True):
    """It was done to this many blocks."""

    num_blocks: _Count = 0


class Stats(_Result, frozen=True):
    """Answer to `GetStats`: names as in the metrics, with what they count."""

    values: Annotated[dict[_Name, float], Meta(max_length=4096)]


class Unknown(_Result, frozen=True):
    """The worker (or its epoch) has not joined this incarnation of the manager, or its lease or store is gone."""

    what: Annotated[str, Meta(max_length=1024)] = ""


class Refused(_Result, frozen=True):
    """This operation failed; `message` carries the typed error (`core.errors`)."""

    message: Annotated[str, Meta(max_length=4000)]


Operation = Join | Store | Commit | Onboard | Await | Renew | Release | Pin | Clear | GetStats
Result = Joined | Stored | Leased | Renewed | Done | Stats | Unknown | Refused

_BatchT = TypeVar("_BatchT")
_OPERATIONS: msgspec.msgpack.Decoder[list[Operation]] = msgspec.msgpack.Decoder(
    Annotated[list[Operation], Meta(max_length=_MAX_OPERATIONS)]
)
_RESULTS: msgspec.msgpack.Decoder[list[Result]] = msgspec.msgpack.Decoder(
    Annotated[list[Result], Meta(max_length=_MAX_OPERATIONS)]
)
_ENCODER = msgspec.msgpack.Encoder()


def encode_batch(batch: Sequence[Operation] | Sequence[Result]) -> bytes:
    """Operations or results as they travel."""
    return _ENCODER.encode(batch)


def decode_operations(raw: bytes) -> list[Operation]:
    """What a worker asks.

    Raises:
        ProtocolError: Too large, not msgpack, or out of bounds; names the field.
    """
    return _decode(_OPERATIONS, raw, "operations")


def decode_results(raw: bytes) -> list[Result]:
    """What the manager answers.

    Raises:
        ProtocolError: See `decode_operations`.
    """
    return _decode(_RESULTS, raw, "results")


def _decode(decoder: msgspec.msgpack.Decoder[_BatchT], raw: bytes, what: str) -> _BatchT:
    if len(raw) > MAX_BATCH_BYTES:
        raise ProtocolError(f"{what}: {len(raw)} bytes exceed the limit of {MAX_BATCH_BYTES}")
    try:
        return decoder.decode(raw)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"{what}: {error}") from None
