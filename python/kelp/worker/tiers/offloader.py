"""Offering sealed blocks to the manager: keep them while it READs them, commit those that were not evicted, let go.

Whatever happens, each kept block is released once. A Store whose answer does not come is released when its `hold_s` has
passed, because the READ may go on that long; it is never committed, so nobody gets what is read afterwards.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from kelp.core.clock import Clock
from kelp.core.config_kv import OffloadConfig
from kelp.core.errors import KelpError, ProtocolError
from kelp.core.hashing import tenant_digest
from kelp.core.kv_manager_messages import Commit, Done, Store, Stored
from kelp.core.kv_manager_values import OfferedBlock
from kelp.core.metrics import OFFLOAD_BLOCKS, Metrics
from kelp.core.types import SequenceHash, WorkerKey
from kelp.executor.base import SealedBlock, TieredExecutor
from kelp.worker.tiers.buffer import OffloadBuffer
from kelp.worker.tiers.link import Link
from kelp.worker.tiers.membership import Membership
from kelp.worker.tiers.pace import Pace

_STORE_BYTES = 16 * 1024 * 1024
"""A Store is a burst of memory traffic; larger ones are cut."""
_MIN_HOLD_S = 2.0
_PATIENCE = 3
"""Times as long may a Store take that is not urgent: the manager's threads give way to others."""
_ANSWER_MARGIN_S = 0.5
_ROOMY_SHARE = 4
"""A pool of which one block of so many can be evicted without loss leaves the manager its time."""
_NOBODY = tenant_digest("")


@dataclass(frozen=True, slots=True)
class OffloadParts:
    """What an offloader needs; `key` is the worker's."""

    key: WorkerKey
    name: str
    executor: TieredExecutor
    membership: Membership
    clock: Clock
    metrics: Metrics
    config: OffloadConfig


class Offloader:
    """See the module docstring; made on the event loop that it belongs to."""

    def __init__(self, parts: OffloadParts) -> None:
        self._parts = parts
        layout = parts.executor.layout
        self._has_blocks = asyncio.Event()
        limit = min(parts.config.max_blocks_in_flight, layout.num_blocks)
        self._loop = asyncio.get_running_loop()
        self.buffer = OffloadBuffer(limit, parts.clock, self._wake)
        self._max_store_blocks = max(1, _STORE_BYTES // layout.block_bytes)
        self._hold_s = max(_MIN_HOLD_S, 2 * parts.config.call_timeout_s)
        self._numbers = itertools.count(1)
        self._pace = Pace()
        self._counted = {"postponed": 0, "evicted": 0}
        self._holding: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Have the executor tell of its blocks; before its first request."""
        config = self._parts.config
        watermark = config.write_back_watermark if config.mode == "write-back" else None
        self._parts.executor.watch_seals(self.buffer.keep, watermark, self.buffer.note_evicted)

    def note_manager(self, is_there: bool) -> None:
        """Blocks are kept only while a manager is there to take them."""
        if is_there and not self.buffer.is_open:
            self.buffer.is_open = True
            self._parts.executor.release_kept(())
        self.buffer.is_open = is_there

    async def run(self) -> None:
        """Store what comes, for ever."""
        while True:
            await self._has_blocks.wait()
            if not self.buffer.num_waiting:
                self._has_blocks.clear()
                continue
            await self._wait_turn()
            blocks = self.buffer.take(self._max_store_blocks)
            link = self._parts.membership.link
            if link is None:
                self._release(blocks, "failed")
            elif blocks:
                self._pace.last_start_s = self._parts.clock.monotonic_s()
                await self._store(link, blocks)
                self._pace.last_end_s = self._parts.clock.monotonic_s()

    async def stop(self) -> None:
        """Let go of everything; `run` has been cancelled and the executor is about to close."""
        self.buffer.is_open = False
        for holding in self._holding:
            holding.cancel()
        await asyncio.gather(*self._holding, return_exceptions=True)

    def _wake(self) -> None:
        """Called from the executor's thread."""
        self._loop.call_soon_threadsafe(self._has_blocks.set)

    async def _wait_turn(self) -> None:
        while self._parts.executor.load().num_running and self._parts.membership.link is not None:
            buffer = self.buffer
            share = buffer.num_waiting / buffer.limit
            wait_s = self._pace.wait_s(self._parts.clock.monotonic_s(), buffer.oldest_s, share)
            if not wait_s:
                return
            await asyncio.sleep(min(wait_s, 0.05))

    def _is_short(self) -> bool:
        """Whether few blocks could be evicted before those that are on their way down."""
        load = self._parts.executor.load()
        num_others = load.num_free_blocks + load.num_cached_blocks - self.buffer.num_held
        return num_others * _ROOMY_SHARE < self._parts.executor.layout.num_blocks

    async def _store(self, link: Link, blocks: Sequence[SealedBlock]) -> None:
        start_s, is_urgent = self._parts.clock.monotonic_s(), self._is_short()
        store = Store(
            *self._parts.key,
            store_id=next(self._numbers),
            tenant=blocks[0].tenant or _NOBODY,
            hold_s=self._hold_s if is_urgent else _PATIENCE * self._hold_s,
            blocks=tuple(map(_offered, blocks)),
            is_urgent=is_urgent,
        )
        try:
            result = await self._parts.membership.call(link, store, store.hold_s + _ANSWER_MARGIN_S)
            if not isinstance(result, Stored):
                raise ProtocolError(f"store: {type(result).__name__} was answered")
        except KelpError:
            self._release_later(blocks, start_s + store.hold_s)
            return
        lost = self.buffer.lost()
        self._release(blocks)
        num_stored = await self._commit(link, store, lost) if result.num_read else 0
        num_known = min(result.num_known, len(blocks))
        self._count(num_stored, "stored")
        self._count(num_known, "known")
        self._count(len(blocks) - num_stored - num_known - len(lost), "refused")

    async def _commit(self, link: Link, store: Store, lost: frozenset[SequenceHash]) -> int:
        """All but the lost blocks were held until the answer came; returns how many can be found below from now on."""
        is_valid = len(lost) < len(store.blocks)
        commit = Commit(store.worker_id, store.epoch, store.store_id, is_valid, tuple(lost) if is_valid else ())
        try:
            result = await self._parts.membership.call(link, commit, self._parts.config.call_timeout_s)
        except KelpError:
            return 0
        return result.num_blocks if isinstance(result, Done) else 0

    def _release(self, blocks: Sequence[SealedBlock], outcome: str = "") -> None:
        if outcome:
            self._count(len(blocks), outcome)
        self.buffer.give_back(len(blocks))
        self._parts.executor.release_kept([block.block_id for block in blocks])

    def _release_later(self, blocks: Sequence[SealedBlock], time_s: float) -> None:
        holding = asyncio.ensure_future(self._hold(blocks, time_s))
        self._holding.add(holding)
        holding.add_done_callback(self._holding.discard)

    async def _hold(self, blocks: Sequence[SealedBlock], time_s: float) -> None:
        try:
            await asyncio.sleep(max(0.0, time_s - self._parts.clock.monotonic_s()))
        finally:
            self._release(blocks, "failed")

    def _count(self, num_blocks: int, outcome: str) -> None:
        if num_blocks > 0:
            self._parts.metrics.add(OFFLOAD_BLOCKS, num_blocks, worker=self._parts.name, outcome=outcome)
        self._count_total(self.buffer.num_postponed, "postponed")
        self._count_total(self.buffer.num_evicted, "evicted")

    def _count_total(self, total: int, outcome: str) -> None:
        added, self._counted[outcome] = total - self._counted[outcome], total
        if added:
            self._parts.metrics.add(OFFLOAD_BLOCKS, added, worker=self._parts.name, outcome=outcome)


def _offered(block: SealedBlock) -> OfferedBlock:
    return OfferedBlock(block.sequence_hash, block.parent or b"", block.position, block.block_id)
