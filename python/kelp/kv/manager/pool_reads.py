"""READs of workers' blocks into slots of the host tier.

A READ that is given up may still write: its slots are out of use until its worker is disconnected (`Members`). Most
READs give way to whoever computes; those that cannot wait have a thread of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class _Lane:
    """A thread that READs, and how many stores may use it at a time."""

    loop: ReadLoop
    turns: asyncio.Semaphore


class PoolReads:
    """See the module docstring; belongs to one event loop."""

    def __init__(self, agent: Agent, members: Members, block_bytes: int, clock: Clock) -> None:
        self._members = members
        self._step = max(1, _READ_BYTES // block_bytes)
        self._lanes = {
            can_wait: _Lane(ReadLoop(agent, clock, _READ_TIMEOUT_S, can_wait), asyncio.Semaphore(_MAX_STORES))
            for can_wait in (False, True)
        }

    async def read(self, member: Member, pairs: Sequence[tuple[int, int]], timeout_s: float, can_wait: bool) -> None:
        """READ a worker's blocks into slots.

        Raises:
            KelpError: Some may still be written to until `Members.disconnect` returns.
        """
        try:
            await asyncio.wait_for(self._read(member, pairs, self._lanes[can_wait]), timeout_s)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"store: not read within hold_s {timeout_s:.3f}") from None

    def close(self) -> None:
        """End the threads; the agent must be closed next."""
        for lane in self._lanes.values():
            lane.loop.close()

    async def _read(self, member: Member, pairs: Sequence[tuple[int, int]], lane: _Lane) -> None:
        peer = await self._members.peer(member)
        async with lane.turns:
            reads = []
            for begin in range(0, len(pairs), self._step):
                part = pairs[begin : begin + self._step]
                read = Read(peer, [BlockId(block) for block, _ in part], [BlockId(slot) for _, slot in part])
                reads.append(asyncio.wrap_future(read.finished))
                lane.loop.submit(read)
            try:
                await asyncio.gather(*reads)
            finally:
                for waiting in reads:
                    waiting.cancel()
