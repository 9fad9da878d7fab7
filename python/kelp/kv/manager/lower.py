"""Each lower tier with all that belongs to it: books or names, its thread, writes, promotions, and catching up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from kelp.core.config_kv import DiskTierConfig, ObjectTierConfig
from kelp.core.errors import KelpError
from kelp.core.kv_events import KVEventSink
from kelp.core.metrics import KV_TIER_BLOCKS, KV_TIER_BYTES, KV_TIER_QUEUE
from kelp.core.types import SequenceHash, Tier
from kelp.kv.manager.books import BookParts, TierBooks
from kelp.kv.manager.cascade import DiskWrites, ObjectWrites, WriteAdmission
from kelp.kv.manager.catching_up import DiskCatchingUp, DiskReader, ObjectCatchingUp, StoreParts
from kelp.kv.manager.events import TierEvents
from kelp.kv.manager.host import HostTier
from kelp.kv.manager.objects import ObjectNames
from kelp.kv.manager.onboarding import ObjectFinder
from kelp.kv.manager.promotions import DiskPromotions, ObjectPromotions, PromotionParts
from kelp.kv.manager.quarantine import Quarantine
from kelp.kv.manager.states import SlotState
from kelp.kv.manager.stats import ManagerStats
from kelp.kv.manager.threads import TierThread
from kelp.kv.tiers.admission import OfferFilter, WriteBudget
from kelp.kv.tiers.base import DiskTier, ObjectTier

_log = logging.getLogger(__name__)
_REMEMBERED_OFFERS = 1_000_000
_POLL_S = 0.25
Work = Coroutine[Any, Any, None]


@dataclass(frozen=True, slots=True)
class Above:
    """What lower tiers hang below."""

    host: HostTier
    promotions: PromotionParts


class DiskSide:
    """Tier G3; belongs to one event loop."""

    def __init__(self, disk: DiskTier, above: Above, parts: BookParts, config: DiskTierConfig) -> None:
        host = above.host
        self._disk = disk
        self._recovered = asyncio.Event()
        self.books = TierBooks(Tier.DISK, disk, parts)
        self.thread = self.books.thread
        self.quarantine = Quarantine(self.thread, lambda: disk.stuck_slots)
        admission = WriteAdmission(
            OfferFilter(config.min_offers, _REMEMBERED_OFFERS),
            WriteBudget(config.max_write_bytes_per_s, host.block_bytes, parts.clock),
        )
        self.writes = DiskWrites(disk, self.books, host, admission, self.quarantine)
        self.promotions = DiskPromotions(disk, self.books, above.promotions, self.quarantine)
        self.reader = DiskReader(host, self.books.shelf, self.promotions)
        self._catching_up = DiskCatchingUp(self.writes, host)

    def loops(self, owed: Callable[[], Iterable[bytes | None]], on_recovered: Callable[[], None]) -> list[Work]:
        """Background work, for ever.

        Args:
            owed: Whose blocks have to be cleared of what is found.
            on_recovered: Called once what earlier managers left can be found.
        """
        return [self._serve(owed, on_recovered), self.promotions.run(), self._catching_up.run()]

    @property
    def owes_wipes(self) -> bool:
        """Whether bytes of what was cleared still lie there."""
        return self._disk.owes_wipes

    def wipe_again(self) -> None:
        """Have the disk try to wipe what it owes."""
        self.thread.start(self._disk.clear, [], True)

    async def clear(self, tenant: bytes | None) -> int:
        """Remove a tenant's blocks, also those that earlier managers left; how many there were."""
        await self._recovered.wait()
        num_removed = self.books.shelf.clear(tenant)
        await self.books.wiped()
        return num_removed

    def report(self, stats: ManagerStats) -> None:
        """Show how it stands."""
        stats.shelf(Tier.DISK, self.books.shelf, self.books.block_bytes)
        stats.set(KV_TIER_QUEUE, self.writes.num_waiting, tier="disk", direction="write")
        stats.disk(self._disk)

    async def _serve(self, owed: Callable[[], Iterable[bytes | None]], on_recovered: Callable[[], None]) -> None:
        try:
            num_recovered = await self.books.recover(owed)
        finally:
            self._recovered.set()
        _log.info("%d KV blocks are on disk", num_recovered)
        on_recovered()
        await self.writes.run()


class StoreSide:
    """Tier G4; belongs to one event loop."""

    def __init__(
        self,
        objects: ObjectTier,
        above: Above,
        disk: DiskSide | None,
        sink: KVEventSink,
        config: ObjectTierConfig,
    ) -> None:
        host = above.host
        names = ObjectNames(TierEvents(Tier.OBJECT, sink), host.stats)
        thread = TierThread("kelp-kv-object")
        self._objects = objects
        self._names = names
        self._refresh_s = config.refresh_s
        self._parts = StoreParts(objects, names, thread, config.max_bytes)
        self._block_bytes = host.block_bytes
        self.thread = thread
        self.quarantine = Quarantine(thread, objects.quarantined)
        shelf = disk.books.shelf if disk is not None else None

        def is_on_disk(name: SequenceHash) -> bool:
            return shelf is not None and name in shelf

        self.writes = ObjectWrites(objects, names, thread, host, self.quarantine, is_on_disk)
        self.promotions = ObjectPromotions(objects, names, thread, above.promotions, self.quarantine)
        self.finder = ObjectFinder(objects, thread)
        reader = disk.reader if disk is not None else None
        self.catching_up = ObjectCatchingUp(self._parts, self.writes, host, reader)

    def loops(self, on_refreshed: Callable[[], Awaitable[None]]) -> list[Work]:
        """Background work, for ever."""
        return [self.writes.run(), self.promotions.run(), self._refresh(on_refreshed), self.catching_up.run()]

    async def clear(self, tenant: bytes | None) -> int:
        """Delete a tenant's objects, whoever wrote them; how many blocks of groups there were.

        Raises:
            KelpError: The store could not be reached; `owed` says so until a refresh has done it.
        """
        num_removed = await self.thread.run(self._objects.forget, tenant)
        self._names.forget(tenant)
        return num_removed

    async def owed(self) -> frozenset[bytes | None]:
        """Whose objects have to be deleted still."""
        return await self.thread.run(lambda: self._objects.owed)

    def report(self, stats: ManagerStats) -> None:
        """Show how it stands."""
        stats.objects(self._objects)
        stats.set(KV_TIER_BLOCKS, len(self._names), tier="object", state=SlotState.RESIDENT.value)
        stats.set(KV_TIER_BYTES, len(self._names) * self._block_bytes, tier="object")
        stats.set(KV_TIER_QUEUE, self.writes.num_waiting, tier="object", direction="write")

    async def _refresh(self, on_refreshed: Callable[[], Awaitable[None]]) -> None:
        while True:
            # Not later than that: what is owed to the store, or missing there, waits for it.
            while not self._objects.is_available:
                await asyncio.sleep(_POLL_S)
            with contextlib.suppress(KelpError):
                self._names.keep(await self.thread.run(lambda: list(self._objects.refresh())))
                self._parts.is_listed = True
                await on_refreshed()
            await asyncio.sleep(self._refresh_s)
