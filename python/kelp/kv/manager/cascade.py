"""Background writes into the lower tiers.

Blocks are offered when they become visible in the host tier. Nothing waits for these writes: queues are bounded and
what does not fit is not kept below (and counted). A block is held in the host tier only while its write READs it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from kelp.core.errors import KelpError
from kelp.core.metrics import KV_TIER_REFUSED
from kelp.core.types import SequenceHash, Tier
from kelp.kv.manager.books import TierBooks
from kelp.kv.manager.host import HostTier
from kelp.kv.manager.objects import ObjectNames
from kelp.kv.manager.quarantine import Quarantine
from kelp.kv.manager.threads import TierThread
from kelp.kv.tiers.admission import OfferFilter, WriteBudget
from kelp.kv.tiers.base import BlockRecord, DiskTier, ObjectTier

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 8 * 1024 * 1024
_MAX_QUEUED_BLOCKS = 16384
_MAX_QUEUED_GROUPS = 1024
_MAX_INCOMPLETE = 4096
_GROUPS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class WriteAdmission:
    """What is worth the wear of an SSD."""

    offers: OfferFilter
    budget: WriteBudget


class DiskWrites:
    """Writes blocks into the disk tier; belongs to one event loop."""

    def __init__(
        self, disk: DiskTier, books: TierBooks, host: HostTier, admission: WriteAdmission, quarantine: Quarantine
    ) -> None:
        self._disk = disk
        self._books = books
        self._host = host
        self._admission = admission
        self._quarantine = quarantine
        self._queue: deque[SequenceHash] = deque()
        self._queued: set[SequenceHash] = set()
        self._has_work = asyncio.Event()
        self.is_idle = True

    @property
    def num_waiting(self) -> int:
        """Blocks to be written."""
        return len(self._queue)

    def offer(self, records: Sequence[BlockRecord]) -> None:
        """Blocks are in the host tier: keep them here, too, if they are worth it."""
        for record in records:
            name = record.sequence_hash
            if name in self._books.shelf or name in self._queued:
                continue
            if len(self._queue) >= _MAX_QUEUED_BLOCKS:
                self._refuse("queue")
            elif not self._admission.offers.admits(name):
                self._refuse("rarely-offered")
            else:
                self._queue.append(name)
                self._queued.add(name)
                self._has_work.set()

    async def run(self) -> None:
        """Work for ever; cancel to stop."""
        while True:
            if not self._queue:
                self.is_idle = True
                self._has_work.clear()
                await self._has_work.wait()
            self.is_idle = False
            await asyncio.shield(asyncio.ensure_future(self._write_some()))

    async def _write_some(self) -> None:
        sources: list[int] = []
        limit = max(1, _CHUNK_BYTES // self._host.block_bytes)
        while self._queue and len(sources) < limit:
            name = self._queue.popleft()
            self._queued.discard(name)
            slot = self._host.shelf.slot(name)
            if slot is None:
                self._refuse("evicted")
            elif not self._admission.budget.allows(self._host.block_bytes):
                self._refuse("budget")
            else:
                self._host.shelf.hold(slot)
                sources.append(slot)
        is_clean = False
        try:
            is_clean = await self._write(sources)
        except KelpError as error:
            _log.warning("KV blocks could not be written to disk: %s", error)
        if is_clean:
            for slot in sources:
                self._host.shelf.release(slot)
        else:
            await self._quarantine.end(sources, self._host.shelf.release)

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
                self._refuse("failed")
                self._books.shelf.drop(target)

    def _refuse(self, reason: str) -> None:
        self._host.stats.add(KV_TIER_REFUSED, tier="disk", reason=reason)


class ObjectWrites:
    """Writes whole groups of consecutive blocks into the object store; belongs to one event loop."""

    def __init__(
        self, objects: ObjectTier, names: ObjectNames, thread: TierThread, host: HostTier, quarantine: Quarantine
    ) -> None:
        self._objects = objects
        self._names = names
        self._thread = thread
        self._host = host
        self._quarantine = quarantine
        self._queue: deque[SequenceHash] = deque()
        # Last blocks of groups, by the block of the group that was missing when it was looked at.
        self._incomplete: OrderedDict[SequenceHash, SequenceHash] = OrderedDict()
        self._has_work = asyncio.Event()
        self.is_idle = True

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
            if len(self._queue) >= _MAX_QUEUED_GROUPS or not self._objects.is_available:
                self._host.stats.add(KV_TIER_REFUSED, group, tier="object", reason="queue")
                continue
            self._queue.append(last)
            self._has_work.set()

    async def run(self) -> None:
        """Work for ever; cancel to stop."""
        while True:
            if not self._queue:
                self.is_idle = True
                self._has_work.clear()
                await self._has_work.wait()
            self.is_idle = False
            await asyncio.shield(asyncio.ensure_future(self._put_some()))

    async def _put_some(self) -> None:
        groups: list[tuple[list[int], list[BlockRecord]]] = []
        while self._queue and len(groups) < _GROUPS_AT_ONCE:
            if slots := self._group_of(self._queue.popleft()):
                groups.append((slots, [self._host.shelf.record(slot) for slot in slots]))
                for slot in slots:
                    self._host.shelf.hold(slot)
        if not groups:
            return
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
                self._host.stats.add(KV_TIER_REFUSED, len(slots), tier="object", reason="failed")
        await self._let_go([slot for slots, _ in groups for slot in slots], all(are_there))

    async def _let_go(self, slots: Sequence[int], is_clean: bool) -> None:
        if not is_clean:
            await self._quarantine.end(slots, self._host.shelf.release)
            return
        for slot in slots:
            self._host.shelf.release(slot)

    def _group_of(self, last: SequenceHash) -> list[int]:
        """Slots of the group that ends with a block, in order; none if one of them is not there."""
        slots: list[int] = []
        name: SequenceHash | None = last
        while len(slots) < self._objects.group_blocks and name is not None:
            slot = self._host.shelf.slot(name)
            if slot is None:
                self._incomplete[name] = last
                if len(self._incomplete) > _MAX_INCOMPLETE:
                    self._incomplete.popitem(last=False)
                return []
            slots.append(slot)
            name = self._host.shelf.record(slot).parent
        return slots[::-1] if len(slots) == self._objects.group_blocks else []
