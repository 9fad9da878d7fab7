"""READs of workers' blocks into slots of the host tier.

A READ that is given up may still write: its slots are out of use until its worker is disconnected (`Members`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kelp.core.clock import Clock
from kelp.core.errors import DeadlineExceeded
from kelp.core.types import BlockId
from kelp.kv.handoff.reads import Read, ReadLoop
from kelp.kv.manager.members import Member, Members
from kelp.transport.base import Agent

_READ_BYTES = 16 * 1024 * 1024
"""Posting may copy on the spot; smaller READs keep the thread fair and an abandoned one short."""
_READ_TIMEOUT_S = 60.0
"""Longest that a READ stays posted; a store's own deadline comes first."""
_MAX_STORES = 4
"""That are read at once; the others wait, and their deadlines run."""


class PoolReads:
    """See the module docstring; belongs to one event loop."""

    def __init__(self, agent: Agent, members: Members, block_bytes: int, clock: Clock) -> None:
        self._members = members
        self._loop = ReadLoop(agent, clock, _READ_TIMEOUT_S)
        self._step = max(1, _READ_BYTES // block_bytes)
        self._turns = asyncio.Semaphore(_MAX_STORES)

    async def read(self, member: Member, block_ids: Sequence[int], slots: Sequence[int], timeout_s: float) -> None:
        """READ a worker's blocks into slots, pairwise.

        Raises:
            KelpError: Some may still be written to until `Members.disconnect` returns.
        """
        try:
            await asyncio.wait_for(self._read(member, block_ids, slots), timeout_s)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"store: not read within hold_s {timeout_s:.3f}") from None

    def close(self) -> None:
        """End the thread; the agent must be closed next."""
        self._loop.close()

    async def _read(self, member: Member, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        peer = await self._members.peer(member)
        async with self._turns:
            reads = []
            for begin in range(0, len(slots), self._step):
                part = slice(begin, begin + self._step)
                read = Read(
                    peer, [BlockId(block) for block in block_ids[part]], [BlockId(slot) for slot in slots[part]]
                )
                reads.append(asyncio.wrap_future(read.finished))
                self._loop.submit(read)
            try:
                await asyncio.gather(*reads)
            finally:
                for waiting in reads:
                    waiting.cancel()
