"""Bringing blocks from lower tiers into the host tier, chunk by chunk, each block once however many want it.

Whoever wants a block leaves an `Arrival`; it is told the slot, or that the block does not come, on the event loop and
before anything else can take the slot away.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kelp.core.errors import KelpError
from kelp.core.metrics import KV_TIER_REFUSED
from kelp.core.types import SequenceHash, Tier
from kelp.kv.manager.books import TierBooks
from kelp.kv.manager.host import HostTier
from kelp.kv.manager.objects import ObjectNames
from kelp.kv.manager.quarantine import Quarantine
from kelp.kv.manager.rates import TierRates
from kelp.kv.manager.threads import TierThread, to_its_end
from kelp.kv.tiers.base import BlockRecord, DiskTier, ObjectTier

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 8 * 1024 * 1024


class Arrival(Protocol):
    """Somebody who waits for a block."""

    @property
    def is_wanted(self) -> bool:
        """Whether it is still of use."""

    def arrive(self, slot: int | None) -> None:
        """The block lies in this slot and may be held now; None: it will not come."""


@dataclass(eq=False)
class Promotion:
    """One block on its way up, or waiting for it."""

    name: SequenceHash
    position: int
    tenant: bytes
    arrivals: list[Arrival] = field(default_factory=list)

    @property
    def is_wanted(self) -> bool:
        """Whether anybody still waits."""
        return any(arrival.is_wanted for arrival in self.arrivals)


@dataclass(frozen=True, slots=True)
class PromotionParts:
    """What promotions from all tiers share.

    Attributes:
        coming: Blocks on their way up, from whichever tier.
    """

    host: HostTier
    rates: TierRates
    coming: dict[SequenceHash, Promotion] = field(default_factory=dict)


class Promotions:
    """From one lower tier; `bring` and `run` belong to one event loop.

    Attributes:
        quarantine: Of slots that a failed read may still touch.
    """

    def __init__(self, tier: Tier, common: PromotionParts, quarantine: Quarantine) -> None:
        self.tier = tier
        self._host = common.host
        self._rates = common.rates
        self._coming = common.coming
        self.quarantine = quarantine
        self._queue: deque[Promotion] = deque()
        self._has_work = asyncio.Event()

    @property
    def num_waiting(self) -> int:
        """Blocks whose promotion has not begun."""
        return len(self._queue)

    def bring(self, name: SequenceHash, position: int, tenant: bytes, arrival: Arrival) -> None:
        """Bring one block up; those asked for in order of position are read together."""
        promotion = self._coming.get(name)
        if promotion is None:
            promotion = self._coming[name] = Promotion(name, position, tenant)
            self._queue.append(promotion)
            self._has_work.set()
        promotion.arrivals.append(arrival)

    async def run(self) -> None:
        """Work for ever; cancel to stop."""
        while True:
            if not self._queue:
                self._has_work.clear()
                await self._has_work.wait()
            chunk = self._take_chunk()
            await to_its_end(self._promote_guarded(chunk))

    def _take_chunk(self) -> list[Promotion]:
        chunk: list[Promotion] = []
        while self._queue and len(chunk) < self._chunk_blocks() and self._may_follow(chunk, self._queue[0]):
            promotion = self._queue.popleft()
            if promotion.is_wanted and not self._finish_early(promotion):
                chunk.append(promotion)
            elif not promotion.is_wanted:
                self._finish(promotion, None)
        return chunk

    def _finish_early(self, promotion: Promotion) -> bool:
        slot = self._host.shelf.slot(promotion.name)
        if slot is None:
            return False
        self._finish(promotion, slot)
        return True

    async def _promote_guarded(self, chunk: list[Promotion]) -> None:
        if not chunk:
            return
        slots: list[int] = []
        try:
            slots = self._reserve(chunk)
            for promotion in chunk[len(slots) :]:
                self._host.stats.add(KV_TIER_REFUSED, tier="host", reason="full")
                self._finish(promotion, None)
            await self._host.forget_stale(slots)
            found = await self._load(chunk[: len(slots)], slots)
        except KelpError as error:
            _log.warning("KV blocks could not be read from tier %s: %s", self.tier.name.lower(), error)
            found = [None] * len(slots)
        for promotion, slot, record in zip(chunk, slots, found, strict=False):
            self._land(promotion, slot, record)
        failed = [slot for slot, record in zip(slots, found, strict=True) if record is None]
        await self.quarantine.end(failed, self._host.shelf.drop)

    def _reserve(self, chunk: list[Promotion]) -> list[int]:
        slots: list[int] = []
        for promotion in chunk:
            taken = self._host.shelf.reserve(promotion.tenant, 1)
            if not taken:
                break
            slots += taken
        return slots

    async def _load(self, chunk: list[Promotion], slots: list[int]) -> list[BlockRecord | None]:
        if not chunk:
            return []
        start_s = self._host.clock.monotonic_s()
        found = await self._read(chunk, slots)
        seconds = self._host.clock.monotonic_s() - start_s
        num_found = sum(record is not None for record in found)
        self._rates.observe(self.tier, num_found, seconds)
        self._host.stats.moved(self.tier, "read", num_found * self._host.block_bytes, seconds)
        return found

    def _land(self, promotion: Promotion, slot: int, record: BlockRecord | None) -> None:
        if record is None:
            self._finish(promotion, None)
            return
        self._host.settle(slot, record)
        # The slot of another copy, if one came in meanwhile; none, if the block has been cleared.
        self._finish(promotion, self._host.shelf.slot(promotion.name))

    def _finish(self, promotion: Promotion, slot: int | None) -> None:
        del self._coming[promotion.name]
        for arrival in promotion.arrivals:
            arrival.arrive(slot)

    def _chunk_blocks(self) -> int:
        raise NotImplementedError

    def _may_follow(self, chunk: Sequence[Promotion], promotion: Promotion) -> bool:
        raise NotImplementedError

    async def _read(self, chunk: Sequence[Promotion], slots: Sequence[int]) -> list[BlockRecord | None]:
        raise NotImplementedError


class DiskPromotions(Promotions):
    """From slot files."""

    def __init__(self, disk: DiskTier, books: TierBooks, common: PromotionParts, quarantine: Quarantine) -> None:
        super().__init__(Tier.DISK, common, quarantine)
        self._disk = disk
        self._books = books

    def _chunk_blocks(self) -> int:
        return max(1, _CHUNK_BYTES // self._host.block_bytes)

    def _may_follow(self, chunk: Sequence[Promotion], promotion: Promotion) -> bool:
        return True

    async def read(self, names: Sequence[SequenceHash], slots: Sequence[int]) -> list[BlockRecord | None]:
        """Read blocks into slots of the host tier, pairwise; a record for each that is right.

        Raises:
            KelpError: Slots of those that are missing may still be written to: `Quarantine` says how long.
        """
        shelf = self._books.shelf
        moves: list[tuple[int, int, BlockRecord]] = []
        for name, slot in zip(names, slots, strict=True):
            source = shelf.slot(name)
            if source is not None:
                shelf.hold(source)
                moves.append((source, slot, shelf.record(source)))
        found: dict[SequenceHash, BlockRecord] = {}
        try:
            are_right = await self._books.thread.run(self._disk.read, moves)
            for (_, _, record), is_right in zip(moves, are_right, strict=True):
                if is_right:
                    found[record.sequence_hash] = record
                else:
                    self._books.found_corrupt(record.sequence_hash)
        finally:
            for source, _, _ in moves:
                shelf.release(source)
        return [found.get(name) for name in names]

    async def _read(self, chunk: Sequence[Promotion], slots: Sequence[int]) -> list[BlockRecord | None]:
        found = await self.read([promotion.name for promotion in chunk], slots)
        for record in found:
            if record is not None and record.sequence_hash in self._books.shelf:
                self._books.shelf.hit(record.sequence_hash)
        return found


class ObjectPromotions(Promotions):
    """From the object store; a chunk is consecutive blocks of one tenant, a few whole groups at most."""

    _MAX_GROUPS = 4

    def __init__(
        self,
        objects: ObjectTier,
        names: ObjectNames,
        thread: TierThread,
        common: PromotionParts,
        quarantine: Quarantine,
    ) -> None:
        super().__init__(Tier.OBJECT, common, quarantine)
        self._objects = objects
        self._names = names
        self._thread = thread

    def _chunk_blocks(self) -> int:
        return self._MAX_GROUPS * self._objects.group_blocks

    def _may_follow(self, chunk: Sequence[Promotion], promotion: Promotion) -> bool:
        if not chunk:
            return True
        last, first = chunk[-1], chunk[0]
        is_next = promotion.position == last.position + 1 and promotion.tenant == last.tenant
        group = self._objects.group_blocks
        return is_next and promotion.position // group < first.position // group + self._MAX_GROUPS

    async def _read(self, chunk: Sequence[Promotion], slots: Sequence[int]) -> list[BlockRecord | None]:
        moves = [(promotion.name, slot) for promotion, slot in zip(chunk, slots, strict=True)]
        found = await self._thread.run(self._objects.get, moves, chunk[0].position, chunk[0].tenant)
        self._names.put([record for record in found if record is not None])
        return found
