"""Values inside the messages of `core.kv_manager_messages`: names, memory and slots, each with its bounds."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from kelp.core.types import Tier

MAX_BLOCKS = 16384
"""Blocks in one operation."""

Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
Parent = Annotated[bytes, Meta(max_length=16)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=0, lt=2**31)]
Address = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=86400)]
Share = Annotated[float, Meta(ge=0, le=1)]
LeaseId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Device = Annotated[str, Meta(pattern=r"^(cpu|cuda(:[0-9]{1,3})?)\Z")]
Metadata = Annotated[bytes, Meta(max_length=1024 * 1024)]
Digests = Annotated[tuple[Digest, ...], Meta(max_length=MAX_BLOCKS)]
LeaseIds = Annotated[tuple[LeaseId, ...], Meta(max_length=MAX_BLOCKS)]


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the values inside operations and results."""


class SpaceRecord(Value, frozen=True):
    """What must be equal for one party's bytes to mean the same to the other: `core.types.KVLayout` without its size.

    Attributes:
        hash_version: `core.hashing.HASH_VERSION`.
    """

    num_layers: Annotated[int, Meta(ge=1, lt=2**16)]
    num_kv_heads: Annotated[int, Meta(ge=1, lt=2**16)]
    block_size: Annotated[int, Meta(ge=1, lt=2**16)]
    head_dim: Annotated[int, Meta(ge=1, lt=2**16)]
    dtype: Name
    model_id: Name
    hash_version: Count


class PoolRecord(Value, frozen=True):
    """Memory that a peer may READ: block *b* is `block_bytes` bytes at `base_address + b * stride_bytes`.

    Attributes:
        agent_metadata: Of the owner's transport agent (`transport.base.Agent.metadata`).
    """

    agent_metadata: Metadata
    base_address: Address
    num_blocks: Annotated[int, Meta(ge=1, lt=2**31)]
    block_bytes: Annotated[int, Meta(ge=1, lt=2**31)]
    stride_bytes: Annotated[int, Meta(ge=1, lt=2**31)]
    device: Device


class OfferedBlock(Value, frozen=True, array_like=True):
    """A sealed block that the sender holds still.

    Attributes:
        parent: The block before it in its sequence; empty for the first.
        position: Its index in the sequence: what recomputing it costs grows with it.
        block_id: In the sender's pool.
    """

    sequence_hash: Digest
    parent: Parent
    position: Count
    block_id: Count


class TierRun(Value, frozen=True, array_like=True):
    """Consecutive blocks of a prompt that were found in one tier."""

    tier: Tier
    num_blocks: Count


class SlotRef(Value, frozen=True, array_like=True):
    """A block in the manager's host tier, readable under a lease.

    Attributes:
        checksum: `kv.tiers.records.checksum` of its `block_bytes` bytes.
    """

    slot: Count
    checksum: Annotated[bytes, Meta(min_length=8, max_length=8)]
