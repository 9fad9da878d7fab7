"""What workers and the KV block manager say to each other.

One call of the model `kv_block_manager` carries a batch of operations and returns a result for each, in order. Bytes of
KV never travel here: the manager READs what a worker stores, a worker READs what it onboards, each into memory of its
own, so an abandoned transfer can never corrupt what somebody else was given.

Storing is two steps, because NIXL does not notice memory that is reused under a READ: `Store` names blocks that the
worker holds still; the manager answers when it has read those it wants; only the worker knows whether it held them all
the time, and says so with `Commit`. Until then nobody is given their content. Onboarding is a lease on slots of the
manager: what a worker has READ counts only if the READ ended before the lease, counted from the sending of the last
answered `Renew`, ran out. msgspec checks every field and bound while it decodes; nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from kelp.core.errors import ProtocolError
from kelp.core.kv_manager_values import (
    MAX_BLOCKS,
    Count,
    Digest,
    Digests,
    LeaseId,
    LeaseIds,
    Name,
    OfferedBlock,
    PoolRecord,
    Seconds,
    Share,
    SlotRef,
    SpaceRecord,
    TierRun,
    Value,
)
from kelp.core.types import Tier

__all__ = [
    "MAX_BATCH_BYTES", "MAX_BLOCKS", "Await", "Clear", "Commit", "Digest", "Done", "GetStats", "Join", "Joined",
    "Leased", "Match", "Matched", "OfferedBlock", "Onboard", "Operation", "Pin", "PoolRecord", "Refused", "Release",
    "Renew", "Renewed", "Result", "SlotRef", "SpaceRecord", "Stats", "Store", "Stored", "TierRun", "Unknown",
    "decode_operations", "decode_results", "encode_batch",
]  # fmt: skip

MAX_BATCH_BYTES = 4 * 1024 * 1024
_MAX_OPERATIONS = 256


class _Operation(Value, frozen=True, tag_field="op", tag=str.lower):
    """Base of what a worker asks."""


class _Result(Value, frozen=True, tag_field="result", tag=str.lower):
    """Base of what the manager answers."""


class Join(_Operation, frozen=True):
    """First, and again whenever `Unknown` is answered: introduce a worker's pool and get the manager's."""

    worker_id: Name
    epoch: Name
    space: SpaceRecord
    pool: PoolRecord


class Joined(_Result, frozen=True):
    """Attributes: `pool` is the host tier; `manager_epoch` names this incarnation; `tiers` are those it has."""

    manager_epoch: Name
    pool: PoolRecord
    lease_ttl_s: Seconds
    tiers: Annotated[tuple[Tier, ...], Meta(max_length=len(Tier))]


class Store(_Operation, frozen=True, omit_defaults=True):
    """Keep these blocks of one tenant if they are worth it; answered by `Stored` when the READs have ended.

    Attributes:
        store_id: The worker's own number, new with every `Store`.
        tenant: `core.hashing.tenant_digest` of the cache salt.
        hold_s: How long the worker holds the blocks at least; a READ that takes longer is given up.
        is_urgent: The worker may soon have to evict them; others give way to those who compute.
    """

    worker_id: Name
    epoch: Name
    store_id: LeaseId
    tenant: Digest
    hold_s: Seconds
    blocks: Annotated[tuple[OfferedBlock, ...], Meta(min_length=1, max_length=MAX_BLOCKS)]
    is_urgent: bool = False


class Stored(_Result, frozen=True):
    """Attributes: `num_read` blocks were read and wait for `Commit`; `num_known` were there, the rest is not wanted."""

    num_read: Count
    num_known: Count


class Commit(_Operation, frozen=True, omit_defaults=True):
    """A `Store` has been answered: its blocks were unchanged till then but for `lost` (`is_valid` False: drop all)."""

    worker_id: Name
    epoch: Name
    store_id: LeaseId
    is_valid: bool = True
    lost: Digests = ()


class Onboard(_Operation, frozen=True, omit_defaults=True):
    """Lease the longest known run of `hashes`, from its start, as far as bringing it pays; lower tiers are promoted.

    Attributes:
        lease_id: The worker's own number, new with every `Onboard`.
        tenant: `core.hashing.tenant_digest` of the cache salt: where the object store keeps the blocks.
        hashes: Consecutive blocks of one prompt; the worker lacks them from the first on.
        first_position: Index of the first in its sequence.
        recompute_s: Predicted time to compute all of `hashes`; 0 if unknown or of no interest: bring all.
        timeout_s: What is not ready by then is not wanted.
        quadratic_share: Of `recompute_s`, what grows with the square of the number of blocks (attention); the rest
            grows with the number.
    """

    worker_id: Name
    epoch: Name
    lease_id: LeaseId
    tenant: Digest
    hashes: Annotated[tuple[Digest, ...], Meta(min_length=1, max_length=MAX_BLOCKS)]
    first_position: Count
    recompute_s: Seconds
    timeout_s: Seconds
    quadratic_share: Share = 0.0


class Leased(_Result, frozen=True, omit_defaults=True):
    """How an onboarding stands; also the answer to `Await`.

    Attributes:
        num_blocks: Leading blocks that will come; may shrink when a lower tier fails. 0: there is no lease.
        ready: Of those asked for, in order, from the first one that the question did not name as known.
        tiers: Where the `num_blocks` blocks were found, as counts by tier.
        runs: The same in the order of the blocks; empty if each tier's lie behind those of the faster ones.
    """

    num_blocks: Count
    ready: Annotated[tuple[SlotRef, ...], Meta(max_length=MAX_BLOCKS)]
    tiers: Annotated[tuple[Count, ...], Meta(min_length=len(Tier), max_length=len(Tier))]
    runs: Annotated[tuple[TierRun, ...], Meta(max_length=MAX_BLOCKS)] = ()


class Await(_Operation, frozen=True):
    """Answered when more than `num_known` leading blocks are ready or nothing more comes, or after half a second."""

    worker_id: Name
    epoch: Name
    lease_id: LeaseId
    num_known: Count


class Renew(_Operation, frozen=True):
    """Extend leases by the ttl; answered with those still alive."""

    worker_id: Name
    epoch: Name
    lease_ids: LeaseIds


class Renewed(_Result, frozen=True):
    """Answer to `Renew`."""

    lease_ids: LeaseIds


class Release(_Operation, frozen=True, omit_defaults=True):
    """These leases are over: their blocks were read or are not wanted. Unknown ones are ignored.

    Attributes:
        corrupt: Blocks whose checksum was wrong where they were read: the manager drops them.
        num_read: Blocks that were READ under these leases and found right.
        read_s: The time in which READs and checks of any of them were under way.
    """

    worker_id: Name
    epoch: Name
    lease_ids: LeaseIds
    corrupt: Digests = ()
    num_read: Count = 0
    read_s: Seconds = 0.0


class Match(_Operation, frozen=True, omit_defaults=True):
    """How much of a prompt is known: no lease, no use. Without its tenant (as in `Onboard`) the store is not asked."""

    hashes: Digests
    first_position: Count = 0
    tenant: Digest | None = None


class Matched(_Result, frozen=True):
    """Where the longest known run from the first block on was found, as counts by tier."""

    tiers: Annotated[tuple[Count, ...], Meta(min_length=len(Tier), max_length=len(Tier))]


class Pin(_Operation, frozen=True):
    """Keep these blocks in the host tier for a while; 0 seconds unpins. Answered with how many are there."""

    hashes: Digests
    ttl_s: Seconds


class Clear(_Operation, frozen=True):
    """Really remove a tenant's blocks (also other hosts' in the object store); None: everybody's.

    What an unreachable object store keeps is refused, and done later: also by the next manager if this one dies.

    Attributes:
        tiers: From these alone; empty for all.
    """

    tenant: Digest | None
    tiers: Annotated[tuple[Tier, ...], Meta(max_length=len(Tier))] = ()


class GetStats(_Operation, frozen=True):
    """Counts for people and tests."""


class Done(_Result, frozen=True):
    """It was done to this many blocks."""

    num_blocks: Count = 0


class Stats(_Result, frozen=True):
    """Answer to `GetStats`: names as in the metrics, with what they count."""

    values: Annotated[dict[Name, float], Meta(max_length=4096)]


class Unknown(_Result, frozen=True):
    """The worker (or its epoch) has not joined this incarnation of the manager, or its lease or store is gone."""

    what: Annotated[str, Meta(max_length=1024)] = ""


class Refused(_Result, frozen=True):
    """This operation failed; `message` carries the typed error (`core.errors`)."""

    message: Annotated[str, Meta(max_length=4000)]


Operation = Join | Store | Commit | Onboard | Await | Renew | Release | Match | Pin | Clear | GetStats
Result = Joined | Stored | Leased | Renewed | Matched | Done | Stats | Unknown | Refused

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
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{what}: {error}") from None
