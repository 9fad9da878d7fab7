"""Background writes into disk tier and object store.

Blocks are offered when they become visible in the host tier, and again by `catching_up` if they were missed then.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kelp.core.errors import KelpError
from kelp.core.types import SequenceHash, Tier
from kelp.kv.manager.books import TierBooks
from kelp.kv.manager.host import HostTier
from kelp.kv.manager.objects import ObjectNames
from kelp.kv.manager.quarantine import Quarantine
from kelp.kv.manager.threads import TierThread
from kelp.kv.manager.writes import TierWrites
from kelp.kv.tiers.admission import OfferFilter, WriteBudget
from kelp.kv.tiers.base import BlockRecord, DiskTier, ObjectTier

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 8 * 1024 * 1024
_MAX_QUEUED_BLOCKS = 16384
_MAX_QUEUED_GROUPS = 1024
_MAX_INCOMPLETE = 4096
_GROUPS_AT_ONCE = 8
_BUDGET_PAUSE_S = 0.05

Group = tuple[list[int], list[BlockRecord]]
"""Slots of the host tier, and what lies there: consecutive blocks that make up one object."""


@dataclass(frozen=True, slots=True)
class WriteAdmission:
    """What is worth the wear of an SSD."""

    offers: OfferFilter
    budget: WriteBudget


class DiskWrites(TierWrites):
    """Writes blocks into the disk tier; belongs to one event loop."""

    def __init__(
        self, disk: DiskTier, books: TierBooks, host: HostTier, admission: WriteAdmission, quarantine: Quarantine
    ) -> None:
        super().__init__(Tier.DISK, host, quarantine, _MAX_QUEUED_BLOCKS)
        self._disk = disk
        self._books = books
        self._admission = admission
        self._queued: set[SequenceHash] = set()

    @property
    def num_waiting(self) -> int:
        """Blocks to be written."""
        return len(self._queue)

    @property
    def num_free(self) -> int:
        """Places on disk that nothing lies in and nothing waits for."""
        return self._books.shelf.num_free - len(self._queue)

    def offer(self, records: Sequence[BlockRecord]) -> None:
        """Blocks are in the host tier: keep them here, too, if they are worth it."""
        for record in records:
            name = record.sequence_hash
            if self._is_here(name):
                continue
            if not self._admission.offers.admits(name):
                self._refuse("rarely-offered")
            elif self._is_full:
                self._miss_block(name, "queue")
            else:
                self._enqueue_block(name)

    def offer_again(self, name: SequenceHash) -> None:
        """A block is in the host tier: write it if it was admitted once and there is a place; counts as no offer."""
        is_wanted = not self._is_here(name) and self._admission.offers.has_admitted(name)
        if is_wanted and self.num_free > 0 and not self._is_full:
            self._enqueue_block(name)

    def _is_here(self, name: SequenceHash) -> bool:
        return name in self._books.shelf or name in self._queued

    def _enqueue_block(self, name: SequenceHash) -> None:
        self._queued.add(name)
        self._enqueue(name)

    def _miss_block(self, name: SequenceHash, reason: str) -> None:
        self._admission.offers.restore(name)
        self._miss(reason)

    async def _write_some(self) -> None:
        sources = self._take_sources()
        if not sources:
            await asyncio.sleep(_BUDGET_PAUSE_S if self._queue else 0)
            return
        is_clean = False
        try:
            is_clean = await self._write(sources)
        except KelpError as error:
            _log.warning("KV blocks could not be written to disk: %s", error)
        await self.let_go(sources, is_clean, self._host.shelf.release)

    def _take_sources(self) -> list[int]:
        """Hold what is to be written next: as much as the budget allows now."""
        sources: list[int] = []
        limit = max(1, _CHUNK_BYTES // self._host.block_bytes)
        while self._queue and len(sources) < limit:
            slot = self._host.shelf.slot(self._queue[0])
            if slot is not None and not self._admission.budget.allows(self._host.block_bytes):
                break
            self._queued.discard(self._queue.popleft())
            if slot is None:
                self._refuse("evicted")
            else:
                self._host.shelf.hold(slot)
                sources.append(slot)
        return sources

    async def _write(self, sources: Sequence[int]) -> bool:
        """Whether nothing has failed."""
        moves: list[tuple[int, int, BlockRecord]] = []
        for source in sources:
            record = self._host.shelf.record(source)
            target = self._books.shelf.reserve(record.tenant, 1)
            if not target:
                self._refuse("full")
            else:
                moves.append((source, target[0], record))
        are_durable = [False] * len(moves)
        start_s = self._host.clock.monotonic_s()
        try:
            await self._books.forget_stale([target for _, target, _ in moves])
            are_durable = await self._books.thread.run(self._disk.write, moves) if moves else []
        finally:
            self._land(moves, are_durable)
        num_bytes = sum(are_durable) * self._host.block_bytes
        self._host.stats.moved(Tier.DISK, "write", num_bytes, self._host.clock.monotonic_s() - start_s)
        return all(are_durable)

    def _land(self, moves: Sequence[tuple[int, int, BlockRecord]], are_durable: Sequence[bool]) -> None:
        for (_, target, record), is_durable in zip(moves, are_durable, strict=True):
            if is_durable:
                self._books.shelf.settle(target, record)
            else:
                self._miss_block(record.sequence_hash, "failed")
                self._books.shelf.drop(target)


class ObjectWrites(TierWrites):
    """Writes whole groups of consecutive blocks into the object store; belongs to one event loop.

    Args:
        is_on_disk: Whether a block that is not in the host tier lies on disk.
    """

    def __init__(
        self,
        objects: ObjectTier,
        names: ObjectNames,
        thread: TierThread,
        host: HostTier,
        quarantine: Quarantine,
        is_on_disk: Callable[[SequenceHash], bool],
    ) -> None:
        super().__init__(Tier.OBJECT, host, quarantine, _MAX_QUEUED_GROUPS)
        self._objects = objects
        self._names = names
        self._thread = thread
        self._is_on_disk = is_on_disk
        # Last blocks of groups, by the block of the group that was missing when it was looked at.
        self._incomplete: OrderedDict[SequenceHash, SequenceHash] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        """Blocks to be written."""
        return len(self._queue) * self._objects.group_blocks

    def offer(self, records: Sequence[BlockRecord]) -> None:
        """Blocks are in the host tier: write the groups that they complete."""
        group = self._objects.group_blocks
        for record in records:
            is_last = record.position % group == group - 1
            last = record.sequence_hash if is_last else self._incomplete.pop(record.sequence_hash, None)
            if last is None:
                continue
            if self._is_full or not self._objects.is_available:
                self._miss("queue", group)
            else:
                self._enqueue(last)

    async def put(self, groups: Sequence[Group]) -> list[bool]:
        """Write groups whose slots the caller keeps still; says which the store has.

        What the store does not have may still be READ from its slots: `Quarantine` says how long.
        """
        start_s = self._host.clock.monotonic_s()
        try:
            are_there = await self._thread.run(self._objects.put_groups, groups)
        except KelpError as error:
            _log.warning("KV blocks could not be written to the object store: %s", error)
            are_there = [False] * len(groups)
        seconds = self._host.clock.monotonic_s() - start_s
        num_written = sum(are_there) * self._objects.group_blocks
        self._host.stats.moved(Tier.OBJECT, "write", num_written * self._host.block_bytes, seconds)
        for (slots, records), is_there in zip(groups, are_there, strict=True):
            if is_there:
                self._names.put(records)
            else:
                self._miss("failed", len(slots))
        return are_there

    async def _write_some(self) -> None:
        groups: list[Group] = []
        held: list[int] = []
        while self._queue and len(groups) < _GROUPS_AT_ONCE:
            if slots := self._group_of(self._queue.popleft()):
                groups.append((slots, [self._host.shelf.record(slot) for slot in slots]))
                held += slots
                for slot in slots:
                    self._host.shelf.hold(slot)
        if groups:
            are_there = await self.put(groups)
            await self.let_go(held, all(are_there), self._host.shelf.release)

    def _group_of(self, last: SequenceHash) -> list[int]:
        """Slots of the group that ends with a block, in order; none if one of them is not there."""
        slots: list[int] = []
        name: SequenceHash | None = last
        while len(slots) < self._objects.group_blocks and name is not None:
            slot = self._host.shelf.slot(name)
            if slot is None:
                self._await_block(name, last)
                return []
            slots.append(slot)
            name = self._host.shelf.record(slot).parent
        return slots[::-1] if len(slots) == self._objects.group_blocks else []

    def _await_block(self, name: SequenceHash, last: SequenceHash) -> None:
        self._incomplete[name] = last
        if len(self._incomplete) > _MAX_INCOMPLETE:
            self._incomplete.popitem(last=False)
        if self._is_on_disk(name):
            self.missed.set()
