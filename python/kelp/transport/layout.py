"""What a peer says about its KV pool, checked and turned into addresses.

A description is input like a client's: every field that decides an address or the meaning of bytes is compared
with the local pool before a descriptor is made from it. Knows nothing of how a description travels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kelp.core.errors import ProtocolError
from kelp.core.handoff_messages import PeerDescription
from kelp.core.types import BlockId, KVLayout
from kelp.transport.base import Agent, Region

_ADDRESS_LIMIT = 2**64
_MAX_PEER_BLOCKS = 2**22
"""Descriptors are made for all blocks of a peer; a larger claim would only exhaust our memory."""

_EXCHANGED_FIELDS = tuple(field.name for field in dataclasses.fields(KVLayout) if field.name != "num_blocks")


def pool_region(layout: KVLayout, base_address: int, device: str) -> Region:
    """The blocks of a pool of `layout` that starts at `base_address`."""
    return Region(base_address, layout.num_blocks, layout.block_bytes, device)


def describe_pool(agent: Agent, layout: KVLayout, region: Region, worker: str, epoch: str) -> PeerDescription:
    """What a reader needs to address the pool that `agent` has registered as `region`."""
    return PeerDescription(
        worker=worker,
        epoch=epoch,
        agent_name=agent.name,
        agent_metadata_hex=agent.metadata().hex(),
        base_address=region.base_address,
        device=region.device,
        **dataclasses.asdict(layout),
    )


def peer_region(local: KVLayout, description: PeerDescription) -> Region:
    """The described pool, if its blocks mean the same bytes as blocks of `local`.

    Raises:
        ProtocolError: A field differs or the pool would not fit an address space; names the field.
    """
    for field in _EXCHANGED_FIELDS:
        ours, theirs = getattr(local, field), getattr(description, field)
        if ours != theirs:
            raise ProtocolError(f"peer {description.worker}: {field} is {theirs!r}, this worker needs {ours!r}")
    if description.num_blocks > _MAX_PEER_BLOCKS:
        raise ProtocolError(
            f"peer {description.worker}: num_blocks {description.num_blocks} exceeds the limit of {_MAX_PEER_BLOCKS}"
        )
    num_bytes = description.num_blocks * local.block_bytes
    if description.base_address + num_bytes > _ADDRESS_LIMIT:
        raise ProtocolError(
            f"peer {description.worker}: num_blocks {description.num_blocks} from base_address "
            f"{description.base_address:#x} exceeds the limit of {_ADDRESS_LIMIT:#x}"
        )
    return Region(description.base_address, description.num_blocks, local.block_bytes, description.device)


def device_number(region: Region) -> int:
    """Index of the region's accelerator; 0 for host memory."""
    return 0 if region.device == "cpu" else int(region.device.partition(":")[2] or 0)


def descriptor_rows(region: Region) -> npt.NDArray[np.uint64]:
    """`[num_blocks, 3]`: address, bytes and device number of each block."""
    rows = np.empty((region.num_blocks, 3), dtype=np.uint64)
    offsets = np.arange(region.num_blocks, dtype=np.uint64) * np.uint64(region.stride)
    rows[:, 0] = np.uint64(region.base_address) + offsets
    rows[:, 1] = region.block_bytes
    rows[:, 2] = device_number(region)
    return rows


def check_block_ids(block_ids: Sequence[BlockId], num_blocks: int, what: str) -> None:
    """Refuse ids outside a pool of `num_blocks`.

    Raises:
        ProtocolError: Names `what`, the first bad id and the limit.
    """
    for block_id in block_ids:
        if not 0 <= block_id < num_blocks:
            raise ProtocolError(f"{what}: block id {block_id} is outside the pool of {num_blocks} blocks")


def check_read(
    local: Region | None, remote: Region, remote_ids: Sequence[BlockId], local_ids: Sequence[BlockId]
) -> None:
    """Refuse a READ whose ids do not pair up inside both pools.

    Raises:
        ProtocolError: Names the list, the value and the limit.
    """
    if local is None:
        raise ProtocolError("read: this agent has registered no region")
    if len(remote_ids) != len(local_ids):
        raise ProtocolError(f"read: {len(remote_ids)} remote ids for {len(local_ids)} local ids")
    check_block_ids(remote_ids, remote.num_blocks, "remote_ids")
    check_block_ids(local_ids, local.num_blocks, "local_ids")


def check_regions(local: Region | None, remote: Region) -> Region:
    """The local region, if blocks of `remote` fit into it one to one; how far apart they lie is each side's business.

    Raises:
        ProtocolError: Nothing is registered, the block sizes differ, or the remote blocks would overlap.
    """
    if local is None:
        raise ProtocolError("connect: this agent has registered no region")
    if remote.block_bytes != local.block_bytes:
        raise ProtocolError(f"connect: block_bytes is {remote.block_bytes}, this pool has {local.block_bytes}")
    if remote.stride < remote.block_bytes:
        raise ProtocolError(f"connect: stride_bytes is {remote.stride}, below block_bytes {remote.block_bytes}")
    return local
