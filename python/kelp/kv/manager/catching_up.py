"""Offering again what a lower tier did not take: its queue was full, its store was away, or the write failed.

Nothing is remembered of such blocks. A walk over the tiers above finds what is missing below, so memory stays bounded
however long a store is away, and a restarted manager finds what its predecessor left undone. A walk begins when
something has been missed and the tier is able again; it gives way to what is offered for the first time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from kelp.core.errors import KelpError
from kelp.core.metrics import KV_TIER_EVENTS
from kelp.core.types import SequenceHash
from kelp.kv.manager.cascade import DiskWrites, ObjectWrites
from kelp.kv.manager.host import HostTier
from kelp.kv.manager.objects import ObjectNames
from kelp.kv.manager.promotions import DiskPromotions
from kelp.kv.manager.shelf import Shelf
from kelp.kv.manager.threads import TierThread, to_its_end
from kelp.kv.manager.writes import TierWrites
from kelp.kv.tiers.base import BlockRecord, ObjectTier

_log = logging.getLogger(__name__)
POLL_S = 0.25
"""How often a walk that waits looks whether it may go on."""
PAUSE_S = 30.0
"""Between two walks: what keeps failing costs one attempt in this time."""
_SLOTS_AT_ONCE = 1024
_REST = 1.0
"""The store rests as long as a group took: half of its time at most goes into catching up."""
_MAX_REST_S = 10.0


class CatchingUp:
    """With the writes of one tier; belongs to one event loop.

    Args:
        shelves: Of the tiers above.
    """

    def __init__(self, writes: TierWrites, shelves: Sequence[Shelf]) -> None:
        self._common = writes
        self._shelves = shelves

    async def run(self) -> None:
        """Work for ever; cancel to stop."""
        while True:
            await self._common.missed.wait()
            await self._turn()
            self._common.missed.clear()
            for shelf in self._shelves:
                for begin in range(0, len(shelf.slots), _SLOTS_AT_ONCE):
                    await self._turn()
                    await self._offer(shelf.resident(begin, begin + _SLOTS_AT_ONCE))
            await asyncio.sleep(PAUSE_S)

    async def _turn(self) -> None:
        """Wait until the tier is able to take something, and has nothing else to do."""
        await asyncio.sleep(0)
        while not (self._common.is_idle and self._is_able()):
            await asyncio.sleep(POLL_S)

    def _is_able(self) -> bool:
        raise NotImplementedError

    async def _offer(self, records: Sequence[BlockRecord]) -> None:
        raise NotImplementedError


class DiskCatchingUp(CatchingUp):
    """Blocks of the host tier into free places on disk: nothing leaves the disk for what was missed."""

    def __init__(self, writes: DiskWrites, host: HostTier) -> None:
        super().__init__(writes, [host.shelf])
        self._writes = writes

    def _is_able(self) -> bool:
        return self._writes.num_free > 0

    async def _offer(self, records: Sequence[BlockRecord]) -> None:
        for record in records:
            self._writes.offer_again(record.sequence_hash)


class DiskReader:
    """Blocks that lie on disk alone, in slots of the host tier that are borrowed for a moment."""

    def __init__(self, host: HostTier, shelf: Shelf, promotions: DiskPromotions) -> None:
        self.shelf = shelf
        self._host = host
        self._promotions = promotions

    async def borrow(self, records: Sequence[BlockRecord]) -> list[int]:
        """Slots that hold these blocks of one tenant now, to be dropped; empty if it did not work for all of them."""
        names = [record.sequence_hash for record in records]
        slots = self._host.shelf.reserve(records[0].tenant, len(records))
        found: list[BlockRecord | None] = []
        if len(slots) == len(records):
            try:
                await self._host.forget_stale(slots)
                found = await self._promotions.read(names, slots)
            except KelpError as error:
                _log.warning("KV blocks could not be read from disk for the object store: %s", error)
        if found and None not in found:
            return slots
        await self._promotions.quarantine.end(slots, self._host.shelf.drop)
        return []


@dataclass(eq=False)
class StoreParts:
    """The object store, what it has as far as routers know, and its thread.

    Attributes:
        max_bytes: Its quota; 0 for none.
        is_listed: Whether it has said what it has since the start.
    """

    objects: ObjectTier
    names: ObjectNames
    thread: TierThread
    max_bytes: int
    is_listed: bool = False


class ObjectCatchingUp(CatchingUp):
    """Groups of the host tier and of the disk into the object store, one at a time, while there is room for them.

    Room in its quota, and in their tenant's share of that.

    Attributes:
        is_busy: Whether a group is looked at or on its way.

    Args:
        disk: None where there is no disk tier.
    """

    def __init__(self, parts: StoreParts, writes: ObjectWrites, host: HostTier, disk: DiskReader | None) -> None:
        super().__init__(writes, [host.shelf, *([disk.shelf] if disk is not None else [])])
        self.is_busy = False
        self._parts = parts
        self._objects = parts.objects
        self._names = parts.names
        self._thread = parts.thread
        self._writes = writes
        self._host = host
        self._disk = disk

    def _is_able(self) -> bool:
        group_bytes = self._objects.group_blocks * self._host.block_bytes
        is_full = self._parts.max_bytes and self._objects.stored_bytes + group_bytes > self._parts.max_bytes
        return self._parts.is_listed and not is_full and self._objects.is_available

    async def _offer(self, records: Sequence[BlockRecord]) -> None:
        size, clock = self._objects.group_blocks, self._host.clock
        for record in records:
            if record.position % size == size - 1 and record.sequence_hash not in self._names:
                await self._turn()
                if record.tenant in self._objects.full_tenants:
                    continue
                start_s, self.is_busy = clock.monotonic_s(), True
                await to_its_end(self._catch_up(record.sequence_hash))
                self.is_busy = False
                await asyncio.sleep(min(_MAX_REST_S, _REST * (clock.monotonic_s() - start_s)))

    async def _catch_up(self, last: SequenceHash) -> None:
        group = self._group(last)
        if not group:
            return
        hashes = [record.sequence_hash for record in group]
        try:
            num_found = await self._thread.run(self._objects.find, hashes, group[0].position, group[0].tenant)
        except KelpError:
            num_found = 0
        # Cleared meanwhile, it must not come back.
        if self._group(last) != group:
            return
        if num_found == len(group):
            self._names.put(group)
        else:
            await self._write(group)

    def _group(self, last: SequenceHash) -> list[BlockRecord]:
        """The group that ends with a block, in order; empty if one of its blocks is nowhere above the store."""
        group: list[BlockRecord] = []
        name: SequenceHash | None = last
        while name is not None and len(group) < self._objects.group_blocks:
            record = self._record(name)
            if record is None:
                return []
            group.append(record)
            name = record.parent
        return group[::-1] if len(group) == self._objects.group_blocks else []

    def _record(self, name: SequenceHash) -> BlockRecord | None:
        for shelf in self._shelves:
            slot = shelf.slot(name)
            if slot is not None:
                return shelf.record(slot)
        return None

    async def _write(self, group: list[BlockRecord]) -> None:
        shelf = self._host.shelf
        held = {name: slot for name in map(_name, group) if (slot := shelf.slot(name)) is not None}
        for slot in held.values():
            shelf.hold(slot)
        below = [record for record in group if record.sequence_hash not in held]
        borrowed = await self._disk.borrow(below) if below and self._disk is not None else []
        slots = {**held, **dict(zip(map(_name, below), borrowed, strict=False))}
        is_clean = True
        if len(borrowed) < len(below):
            self._writes.missed.set()
        elif self._group(group[-1].sequence_hash) == group:
            (is_clean,) = await self._writes.put([([slots[name] for name in map(_name, group)], group)])
            self._host.stats.add(KV_TIER_EVENTS, is_clean * len(group), tier="object", kind="caught-up")
        await self._writes.let_go(list(held.values()), is_clean, shelf.release)
        await self._writes.let_go(borrowed, is_clean, shelf.drop)


def _name(record: BlockRecord) -> SequenceHash:
    return record.sequence_hash
