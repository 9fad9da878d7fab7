"""The workers that have joined, and the connections to their pools.

Connecting and disconnecting block for a while, so they happen in threads. After a disconnection no READ from that pool
writes any more: that is what ends the quarantine of slots that an abandoned READ was to fill.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from dataclasses import dataclass

from kelp.core.clock import Clock
from kelp.core.errors import CapacityError, FatalTransferError, KelpError, ProtocolError
from kelp.core.kv_manager_messages import Join, PoolRecord
from kelp.core.types import WorkerKey
from kelp.transport.base import Agent, Peer, Region

_MAX_POOL_BLOCKS = 2**22
"""Descriptors are made for all blocks of a pool; a larger claim would only exhaust our memory."""
_MAX_MEMBERS = 256
_ADDRESS_LIMIT = 2**63


@dataclass(eq=False)
class Member:
    """One incarnation of a worker.

    Attributes:
        seen_s: Monotonic time of its last operation.
    """

    key: WorkerKey
    region: Region
    metadata: bytes
    seen_s: float
    is_gone: bool = False
    connecting: asyncio.Task[Peer] | None = None
    disconnecting: asyncio.Task[None] | None = None


class Members:
    """See the module docstring; belongs to one event loop."""

    def __init__(self, agent: Agent, block_bytes: int, clock: Clock) -> None:
        self._agent = agent
        self._block_bytes = block_bytes
        self._clock = clock
        self._members: dict[str, Member] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._threads = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="kelp-kv-members")

    def __len__(self) -> int:
        """Workers that are known."""
        return len(self._members)

    def get(self, worker_id: str, epoch: str) -> Member | None:
        """The worker, if this incarnation has joined; counts as a sign of life."""
        member = self._members.get(worker_id)
        if member is None or member.key[1] != epoch:
            return None
        member.seen_s = self._clock.monotonic_s()
        return member

    def all(self) -> list[Member]:
        """Workers that are known."""
        return list(self._members.values())

    def silent(self, oldest_s: float) -> list[Member]:
        """Workers that have asked nothing since then."""
        return [member for member in self._members.values() if member.seen_s < oldest_s]

    def predecessor(self, operation: Join) -> Member | None:
        """What the worker has joined as before, if its pool was another one."""
        known = self._members.get(operation.worker_id)
        if known is None or (known.key[1] == operation.epoch and known.metadata == operation.pool.agent_metadata):
            return None
        return known

    def join(self, operation: Join) -> Member:
        """Take a worker in; the connection is made at once, in the background.

        Raises:
            ProtocolError: The pool makes no sense; names the field.
            CapacityError: Too many workers.
        """
        known = self.get(operation.worker_id, operation.epoch)
        if known is not None:
            return known
        if len(self._members) >= _MAX_MEMBERS:
            raise CapacityError(f"join: {_MAX_MEMBERS} workers have joined")
        region = _region(operation.pool, self._block_bytes)
        key = (operation.worker_id, operation.epoch)
        member = Member(key, region, operation.pool.agent_metadata, self._clock.monotonic_s())
        self._members[operation.worker_id] = member
        self._connect(member)
        return member

    async def peer(self, member: Member) -> Peer:
        """The connection to a worker's pool; made again if it was given up.

        Raises:
            KelpError: It cannot be reached, or its metadata is wrong.
        """
        if member.disconnecting is not None:
            await asyncio.wait({member.disconnecting})
        if member.is_gone:
            raise FatalTransferError(f"worker {member.key[0]} has gone")
        return await asyncio.shield(member.connecting or self._connect(member))

    async def disconnect(self, member: Member) -> None:
        """Returns when no READ from the worker's pool writes any more; may take for ever, so await it in a task."""
        if member.disconnecting is None:
            connecting, member.connecting = member.connecting, None
            if connecting is None:
                return
            member.disconnecting = asyncio.ensure_future(self._disconnect(member, connecting))
        await asyncio.wait({member.disconnecting})

    def forget(self, member: Member) -> None:
        """The worker has gone; disconnects in the background."""
        member.is_gone = True
        if self._members.get(member.key[0]) is member:
            del self._members[member.key[0]]
        if member.connecting is not None:
            leaving = asyncio.ensure_future(self.disconnect(member))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def left(self, timeout_s: float) -> None:
        """Wait for a while until those that are forgotten are disconnected."""
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=timeout_s)

    def close(self) -> None:
        """Wait for what runs; blocks."""
        self._threads.shutdown(wait=True)

    def _connect(self, member: Member) -> asyncio.Task[Peer]:
        member.connecting = asyncio.ensure_future(self._open(member))
        member.connecting.add_done_callback(lambda done: done.cancelled() or done.exception())
        return member.connecting

    async def _open(self, member: Member) -> Peer:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, self._agent.connect, member.metadata, member.region)
        except KelpError:
            member.connecting = None
            raise

    async def _disconnect(self, member: Member, connecting: asyncio.Task[Peer]) -> None:
        try:
            peer = await asyncio.shield(connecting)
        except KelpError:
            member.disconnecting = None
            return
        await asyncio.get_running_loop().run_in_executor(self._threads, self._agent.disconnect, peer)
        member.disconnecting = None


def _region(pool: PoolRecord, block_bytes: int) -> Region:
    if pool.block_bytes != block_bytes:
        raise ProtocolError(f"join: pool.block_bytes is {pool.block_bytes}, blocks here have {block_bytes}")
    if pool.stride_bytes < pool.block_bytes:
        raise ProtocolError(f"join: pool.stride_bytes {pool.stride_bytes} is less than block_bytes {block_bytes}")
    if pool.num_blocks > _MAX_POOL_BLOCKS:
        raise ProtocolError(f"join: pool.num_blocks {pool.num_blocks} exceeds the limit of {_MAX_POOL_BLOCKS}")
    if pool.base_address + pool.num_blocks * pool.stride_bytes > _ADDRESS_LIMIT:
        raise ProtocolError(f"join: the pool from {pool.base_address:#x} exceeds the limit of {_ADDRESS_LIMIT:#x}")
    return Region(pool.base_address, pool.num_blocks, pool.block_bytes, pool.device, pool.stride_bytes)
