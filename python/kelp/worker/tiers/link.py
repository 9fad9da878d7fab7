"""The KV block manager that a worker has joined, as long as it is the same incarnation."""

from __future__ import annotations

import asyncio
import concurrent.futures
from dataclasses import dataclass

from kelp.client.base import WorkerAddress
from kelp.core.errors import ProtocolError
from kelp.core.kv_manager_messages import Joined, PoolRecord
from kelp.registry.base import KvManagerRecord
from kelp.transport.base import Agent, Peer, Region

_MAX_SLOTS = 2**24
"""Descriptors are made for all slots of the host tier; a larger claim would only exhaust our memory."""
_ADDRESS_LIMIT = 2**63


@dataclass(eq=False)
class Link:
    """One incarnation of the manager.

    Attributes:
        pool: Its host tier, which `peer` READs from.
        is_dropped: Disconnected, or about to be.
    """

    manager_id: str
    address: WorkerAddress
    epoch: str
    ttl_s: float
    pool: PoolRecord
    peer: Peer
    is_dropped: bool = False


class Links:
    """Connects to host tiers and disconnects, off the event loop that it belongs to."""

    def __init__(self, agent: Agent, block_bytes: int) -> None:
        self._agent = agent
        self._block_bytes = block_bytes
        self._threads = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="kelp-kv-links")
        self._drops: dict[Link, asyncio.Task[None]] = {}

    async def connect(self, record: KvManagerRecord, joined: Joined) -> Link:
        """Make the manager's slots readable.

        Raises:
            ProtocolError: Its pool makes no sense; names the field.
            TransferError: It cannot be reached.
        """
        region = self._region(joined.pool)
        loop = asyncio.get_running_loop()
        peer = await loop.run_in_executor(self._threads, self._agent.connect, joined.pool.agent_metadata, region)
        address = WorkerAddress(record.endpoint, record.model_name, epoch=record.epoch)
        return Link(record.manager_id, address, joined.manager_epoch, joined.lease_ttl_s, joined.pool, peer)

    def drop(self, link: Link) -> asyncio.Task[None]:
        """Disconnect; when the returned task is done, no READ from this peer writes into local memory."""
        if not link.is_dropped:
            link.is_dropped = True
            self._drops[link] = asyncio.ensure_future(self._disconnect(link))
        return self._drops[link]

    async def close(self, timeout_s: float) -> None:
        """Wait for a while until everything dropped is disconnected."""
        if self._drops:
            await asyncio.wait(set(self._drops.values()), timeout=timeout_s)
        self._threads.shutdown(wait=False)

    async def _disconnect(self, link: Link) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, self._agent.disconnect, link.peer)

    def _region(self, pool: PoolRecord) -> Region:
        if pool.block_bytes != self._block_bytes:
            raise ProtocolError(f"joined: pool.block_bytes is {pool.block_bytes}, blocks here have {self._block_bytes}")
        if pool.stride_bytes < pool.block_bytes:
            raise ProtocolError(f"joined: pool.stride_bytes {pool.stride_bytes} is less than {pool.block_bytes}")
        if pool.num_blocks > _MAX_SLOTS:
            raise ProtocolError(f"joined: pool.num_blocks {pool.num_blocks} exceeds the limit of {_MAX_SLOTS}")
        if pool.base_address + pool.num_blocks * pool.stride_bytes > _ADDRESS_LIMIT:
            raise ProtocolError(
                f"joined: the pool from {pool.base_address:#x} exceeds the limit of {_ADDRESS_LIMIT:#x}"
            )
        return Region(pool.base_address, pool.num_blocks, pool.block_bytes, pool.device, pool.stride_bytes)
