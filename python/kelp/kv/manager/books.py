"""A shelf together with the medium that it keeps the books of: forgetting, wiping, events and recovery."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kelp.core.clock import Clock
from kelp.core.errors import KelpError
from kelp.core.kv_events import KVEventSink
from kelp.core.metrics import KV_TIER_CORRUPT, KV_TIER_REMOVED
from kelp.core.types import SequenceHash, Tier
from kelp.kv.eviction.base import EvictionPolicy
from kelp.kv.manager.events import TierEvents
from kelp.kv.manager.shelf import Shelf
from kelp.kv.manager.shelf_watch import ShelfLimits
from kelp.kv.manager.stats import ManagerStats
from kelp.kv.manager.threads import TierThread
from kelp.kv.tiers.base import BlockRecord

_log = logging.getLogger(__name__)
_WIPED_AT_ONCE_BYTES = 64 * 1024 * 1024


class Medium(Protocol):
    """What host arena and disk tier have in common."""

    @property
    def num_slots(self) -> int:
        """Places for blocks."""

    def clear(self, slots: Iterable[int], is_wiped: bool = False) -> None:
        """See `kv.tiers.base`."""

    def recovered(self) -> Iterator[tuple[int, BlockRecord]]:
        """See `kv.tiers.base`."""


@dataclass(frozen=True, slots=True)
class BookParts:
    """What the tiers of a space share.

    Attributes:
        recompute_s: What computing the block at a position takes, relative to other positions.
    """

    make_policy: Callable[[int], EvictionPolicy]
    limits: ShelfLimits
    recompute_s: Callable[[int], float]
    block_bytes: int
    sink: KVEventSink
    stats: ManagerStats
    clock: Clock


class TierBooks:
    """See the module docstring; belongs to one event loop. Implements `ShelfWatch` for its own shelf."""

    def __init__(self, tier: Tier, medium: Medium, parts: BookParts) -> None:
        self.tier = tier
        self.thread = TierThread(f"kelp-kv-{tier.name.lower()}")
        self.stats = parts.stats
        self.clock = parts.clock
        self.block_bytes = parts.block_bytes
        self.shelf = Shelf(medium.num_slots, parts.make_policy(medium.num_slots), parts.limits, self, parts.recompute_s)
        self._medium = medium
        self._events = TierEvents(tier, parts.sink)
        self._arrived: list[BlockRecord] = []
        self._to_wipe: list[int] = []
        self._wiping: set[asyncio.Task[None]] = set()

    def arrived(self, record: BlockRecord) -> None:
        """See `ShelfWatch`; blocks that come together are told together."""
        if not self._arrived:
            asyncio.get_running_loop().call_soon(self._tell_arrived)
        self._arrived.append(record)

    def left(self, record: BlockRecord, reason: str) -> None:
        """See `ShelfWatch`."""
        self._tell_arrived()
        self._events.left([record.sequence_hash])
        self.stats.add(KV_TIER_REMOVED, tier=self.tier.name.lower(), reason=reason)

    def wipe(self, slot: int) -> None:
        """See `ShelfWatch`."""
        if not self._to_wipe:
            asyncio.get_running_loop().call_soon(self._start_wiping)
        self._to_wipe.append(slot)

    async def wiped(self) -> None:
        """Wait until what is to be wiped by now has been."""
        self._start_wiping()
        while self._wiping:
            await asyncio.wait(self._wiping)

    async def forget_stale(self, slots: Sequence[int]) -> None:
        """Make the medium forget what lay in slots that are about to be filled."""
        stale = self.shelf.take_stale(slots)
        if stale:
            await self.thread.run(self._medium.clear, stale)

    def found_corrupt(self, name: SequenceHash) -> None:
        """A block is damaged: nobody gets it any more, nor after a restart."""
        slot = self.shelf.slot(name)
        if slot is not None and self.shelf.remove(name, "corrupt"):
            self.stats.add(KV_TIER_CORRUPT, tier=self.tier.name.lower())
            self.thread.start(self._medium.clear, self.shelf.take_stale([slot]))

    async def recover(self, owed: Callable[[], Iterable[bytes | None]] = tuple) -> int:
        """Take over what earlier processes left; returns how many blocks can be found afterwards.

        Args:
            owed: Asked when all is read: whose blocks (None: everybody's) are to be cleared before anybody finds them.
        """
        found = await self.thread.run(lambda: list(self._medium.recovered()))
        # Also where nothing is found: a store that was not committed leaves bytes without a record.
        self.shelf.suspect_free()
        # As if each sequence had been stored in order.
        found.sort(key=lambda item: item[1].position)
        refused = [slot for slot, record in found if not self.shelf.adopt(slot, record)]
        for tenant in owed():
            self.shelf.clear(tenant)
        if refused:
            await self.thread.run(self._medium.clear, refused)
        return len(self.shelf)

    def _tell_arrived(self) -> None:
        records, self._arrived = self._arrived, []
        self._events.arrived(records)

    def _start_wiping(self) -> None:
        slots, self._to_wipe = self._to_wipe, []
        if slots:
            wiping = asyncio.ensure_future(self._wipe(slots))
            self._wiping.add(wiping)
            wiping.add_done_callback(self._wiping.discard)

    async def _wipe(self, slots: list[int]) -> None:
        step = max(1, _WIPED_AT_ONCE_BYTES // self.block_bytes)
        try:
            for begin in range(0, len(slots), step):
                await self.thread.run(self._medium.clear, slots[begin : begin + step], True)
        except KelpError as error:
            # They stay out of use: what should be gone may still lie there.
            _log.error("%d KV slots of tier %s could not be wiped: %s", len(slots), self.tier.name, error)
            return
        for slot in slots:
            self.shelf.wiped(slot)
