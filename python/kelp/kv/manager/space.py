"""Everything that is kept for one model in one layout: tiers, their books, workers, and the work between them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from kelp.core.errors import KelpError
from kelp.core.kv_manager_messages import Join, SpaceRecord
from kelp.core.metrics import KV_MANAGER_HELD, KV_TIER_QUEUE
from kelp.core.types import SequenceHash, Tier
from kelp.kv.events import EventPublisher
from kelp.kv.manager.books import BookParts, TierBooks
from kelp.kv.manager.cascade import DiskWrites, ObjectWrites, WriteAdmission
from kelp.kv.manager.events import TierEvents
from kelp.kv.manager.host import HostTier
from kelp.kv.manager.members import Member, Members
from kelp.kv.manager.objects import ObjectNames
from kelp.kv.manager.onboarding import ObjectFinder, Onboarding
from kelp.kv.manager.opening import OpenedTiers
from kelp.kv.manager.parts import ManagerParts, Tiers, block_bytes_of, recompute_cost
from kelp.kv.manager.pool_reads import PoolReads
from kelp.kv.manager.promotions import DiskPromotions, ObjectPromotions, PromotionParts, Promotions
from kelp.kv.manager.quarantine import Quarantine
from kelp.kv.manager.rates import TierRates
from kelp.kv.manager.shelf_watch import ShelfLimits
from kelp.kv.manager.stats import ManagerStats
from kelp.kv.manager.stores import Stores
from kelp.kv.manager.threads import TierThread
from kelp.kv.tiers.admission import OfferFilter, WriteBudget
from kelp.kv.tiers.base import BlockRecord

_log = logging.getLogger(__name__)
_SWEEPS_PER_TTL = 40
_MAX_SWEEP_S = 0.5
_SILENT_TTLS = 3.0
_FAREWELL_S = 2.0
_REMEMBERED_OFFERS = 1_000_000


class Space:
    """One model's blocks; belongs to one event loop.

    Attributes:
        record: What is kept here.
        epoch: Names this incarnation in KV events.
        pool: The host tier, as workers READ it.
    """

    def __init__(
        self, record: SpaceRecord, epoch: str, opened: OpenedTiers, parts: ManagerParts, stats: ManagerStats
    ) -> None:
        tiers, agent = opened.tiers, opened.agent
        self.record = record
        self.epoch = epoch
        self.stats = stats
        self.pool = opened.pool()
        self._tiers = tiers
        self._agent = agent
        self._clock = parts.clock
        self._config = parts.config
        config, block_bytes = parts.config, block_bytes_of(record)
        self.publisher = _publisher(self.epoch, record.block_size, parts) if config.events.enabled else None
        sink = self.publisher.sink if self.publisher is not None else lambda _: None
        books = BookParts(
            make_policy=parts.make_policy,
            limits=ShelfLimits(config.kv_manager.tenant_share, config.kv_manager.max_pinned_share),
            recompute_s=recompute_cost(record.block_size),
            block_bytes=block_bytes,
            sink=sink,
            stats=stats,
            clock=parts.clock,
        )
        self.host = HostTier(tiers.arena, config.kv_manager.lease_ttl_s, books)
        self.members = Members(agent, block_bytes, parts.clock)
        self._reads = PoolReads(agent, self.members, block_bytes, parts.clock)
        self.stores = Stores(self.host, self.members, self._reads, self._offer_below)
        self._rates = TierRates(block_bytes)
        self._promotions: dict[Tier, Promotions] = {}
        self._quarantines: list[Quarantine] = []
        self.disk: TierBooks | None = None
        self.disk_writes: DiskWrites | None = None
        self.object_writes: ObjectWrites | None = None
        self._object_thread: TierThread | None = None
        self._object_names = ObjectNames(TierEvents(Tier.OBJECT, sink))
        finder = self._add_lower_tiers(tiers, books)
        self.onboarding = Onboarding(
            self.host, self.disk, finder, self._promotions, self._rates, on_used=self._offer_to_disk
        )
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers that there are."""
        return (Tier.HOST, *self._promotions)

    @property
    def is_used(self) -> bool:
        """Whether a worker is alive, or a block is held."""
        return len(self.members) > 0 or len(self.host.leases) > 0

    async def start(self) -> None:
        """Take over what earlier processes left in the host tier, and begin to work.

        What they left on disk is read in the background.
        """
        if self.publisher is not None:
            self.publisher.start()
        num_recovered = await self.host.recover()
        if num_recovered:
            _log.info("%d KV blocks of an earlier process are in the host tier", num_recovered)
        loops = [self._sweep_forever(), self._check_recovered()]
        loops += [promotions.run() for promotions in self._promotions.values()]
        if self.disk is not None:
            loops.append(self._serve_disk(self.disk))
        if self.object_writes is not None:
            loops += [self.object_writes.run(), self._refresh_forever()]
        self._tasks = [asyncio.ensure_future(_supervised(loop)) for loop in loops]

    async def close(self, is_kept: bool) -> None:
        """Let go of everything; with `is_kept` the host tier's content stays for the next process."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for member in self.members.all():
            self.forget(member)
        await self.stores.close()
        await self.members.left(_FAREWELL_S)
        await asyncio.to_thread(self._close_threads, is_kept)

    def join(self, operation: Join) -> Member:
        """Take a worker in; an earlier incarnation of it is forgotten.

        Raises:
            KelpError: See `Members.join`.
        """
        predecessor = self.members.predecessor(operation)
        if predecessor is not None:
            self.forget(predecessor)
        return self.members.join(operation)

    def forget(self, member: Member) -> None:
        """The worker has gone, and what it held with it."""
        self.members.forget(member)
        self.host.leases.end_of(member.key)
        self.stores.end_of(member.key)

    def pin(self, names: Sequence[SequenceHash], ttl_s: float) -> int:
        """Keep blocks for a while, or with 0 no longer; how many of them are there."""
        shelf, until_s = self.host.shelf, self._clock.monotonic_s() + ttl_s
        if ttl_s == 0:
            for name in names:
                shelf.unpin(name)
            return sum(name in shelf for name in names)
        return sum(shelf.pin(name, until_s) for name in names)

    async def clear(self, tenant: bytes | None) -> int:
        """Remove a tenant's blocks (None: everybody's) from all tiers; how many could be found here.

        Raises:
            KelpError: The object store could not be reached; all else is done.
        """
        num_removed = self.host.shelf.clear(tenant)
        self.stores.cleared()
        await self.host.wiped()
        if self.disk is not None:
            num_removed += self.disk.shelf.clear(tenant)
            await self.disk.wiped()
        if self._tiers.objects is not None and self._object_thread is not None:
            num_removed += await self._object_thread.run(self._tiers.objects.forget, tenant)
            self._object_names.forget(tenant)
        return num_removed

    def sweep(self) -> None:
        """Let go of what has run out, and of workers that are silent."""
        now_s = self._clock.monotonic_s()
        self.host.leases.expire()
        self.onboarding.sweep()
        self.stores.expire(now_s)
        self.host.shelf.expire_pins(now_s)
        for member in self.members.silent(now_s - _SILENT_TTLS * self.host.leases.ttl_s):
            _log.warning("worker %s is silent and forgotten", member.key[0])
            self.forget(member)

    def report(self) -> None:
        """Show how everything stands."""
        stats, shelf = self.stats, self.host.shelf
        stats.shelf(Tier.HOST, shelf, self.host.block_bytes)
        held = {
            "leases": len(self.host.leases), "pins": shelf.num_pins, "stores": len(self.stores),
            "workers": len(self.members), "references": shelf.slots.num_references,
            "unverified": self.host.num_unverified, "quarantined": sum(map(len, self._quarantines)),
        }  # fmt: skip
        for kind, count in held.items():
            stats.set(KV_MANAGER_HELD, count, kind=kind)
        for tier, promotions in self._promotions.items():
            stats.set(KV_TIER_QUEUE, promotions.num_waiting, tier=tier.name.lower(), direction="read")
        if self.disk is not None and self.disk_writes is not None:
            stats.shelf(Tier.DISK, self.disk.shelf, self.host.block_bytes)
            stats.set(KV_TIER_QUEUE, self.disk_writes.num_waiting, tier="disk", direction="write")
        if self._tiers.disk is not None:
            stats.disk(self._tiers.disk)
        if self._tiers.objects is not None:
            stats.objects(self._tiers.objects)
        if self.object_writes is not None:
            stats.set(KV_TIER_QUEUE, self.object_writes.num_waiting, tier="object", direction="write")

    def _add_lower_tiers(self, tiers: Tiers, books: BookParts) -> ObjectFinder | None:
        host, config = self.host, self._config.disk_tier
        common = PromotionParts(host, self._rates)
        if tiers.disk is not None:
            disk = tiers.disk
            self.disk = TierBooks(Tier.DISK, disk, books)
            quarantine = self._quarantine(self.disk.thread, lambda: disk.stuck_slots)
            admission = WriteAdmission(
                OfferFilter(config.min_offers, _REMEMBERED_OFFERS),
                WriteBudget(config.max_write_bytes_per_s, host.block_bytes, self._clock),
            )
            self.disk_writes = DiskWrites(disk, self.disk, host, admission, quarantine)
            self._promotions[Tier.DISK] = DiskPromotions(disk, self.disk, common, quarantine)
        if tiers.objects is None:
            return None
        objects, names = tiers.objects, self._object_names
        thread = self._object_thread = TierThread("kelp-kv-object")
        quarantine = self._quarantine(thread, objects.quarantined)
        self.object_writes = ObjectWrites(objects, names, thread, host, quarantine)
        self._promotions[Tier.OBJECT] = ObjectPromotions(objects, names, thread, common, quarantine)
        return ObjectFinder(objects, thread)

    def _quarantine(self, thread: TierThread, stuck: Callable[[], frozenset[int]]) -> Quarantine:
        self._quarantines.append(Quarantine(thread, stuck))
        return self._quarantines[-1]

    def _offer_below(self, records: Sequence[BlockRecord]) -> None:
        self._offer_to_disk(records)
        if self.object_writes is not None:
            self.object_writes.offer(records)

    def _offer_to_disk(self, records: Sequence[BlockRecord]) -> None:
        if self.disk_writes is not None:
            self.disk_writes.offer(records)

    async def _serve_disk(self, disk: TierBooks) -> None:
        assert self.disk_writes is not None
        num_recovered = await disk.recover()
        _log.info("%d KV blocks are on disk", num_recovered)
        await self.disk_writes.run()

    async def _check_recovered(self) -> None:
        while self.host.num_unverified:
            self._offer_below(await self.host.verify_some())

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(min(self.host.leases.ttl_s / _SWEEPS_PER_TTL, _MAX_SWEEP_S))
            self.sweep()
            self.report()
            for quarantine in self._quarantines:
                await quarantine.sweep()

    async def _refresh_forever(self) -> None:
        objects, thread = self._tiers.objects, self._object_thread
        assert objects is not None and thread is not None
        while True:
            with contextlib.suppress(KelpError):
                self._object_names.keep(await thread.run(lambda: list(objects.refresh())))
            await asyncio.sleep(self._config.object_tier.refresh_s)

    def _close_threads(self, is_kept: bool) -> None:
        self.members.close()
        self._reads.close()
        self.host.thread.close()
        if self.disk is not None:
            self.disk.thread.close()
        if self._object_thread is not None:
            self._object_thread.close()
        self._agent.close()
        self._tiers.close(is_kept)
        if self.publisher is not None:
            self.publisher.close()


def _publisher(epoch: str, block_size: int, parts: ManagerParts) -> EventPublisher:
    changes = {"port": parts.config.kv_manager.port, "replay_port": 0}
    return EventPublisher(epoch, block_size, parts.config.events.model_copy(update=changes), parts.clock)


async def _supervised(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:
        _log.exception("background work of the KV block manager has ended; it serves on without")
