"""Everything that is kept for one model in one layout: tiers, their books, workers, and the work between them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

from kelp.core.kv_events import KVEventSink
from kelp.core.kv_manager_messages import Join, SpaceRecord
from kelp.core.metrics import KV_MANAGER_HELD, KV_TIER_QUEUE
from kelp.core.types import SequenceHash, Tier
from kelp.kv.events import EventPublisher
from kelp.kv.manager.books import BookParts, TierBooks
from kelp.kv.manager.cascade import DiskWrites, ObjectWrites
from kelp.kv.manager.clearing import Clearing
from kelp.kv.manager.host import HostTier
from kelp.kv.manager.lower import Above, DiskSide, StoreSide
from kelp.kv.manager.members import Member, Members
from kelp.kv.manager.onboarding import Onboarding
from kelp.kv.manager.opening import OpenedTiers
from kelp.kv.manager.parts import ManagerParts, block_bytes_of, recompute_cost
from kelp.kv.manager.pool_reads import PoolReads
from kelp.kv.manager.promotions import PromotionParts
from kelp.kv.manager.rates import TierRates
from kelp.kv.manager.shelf_watch import ShelfLimits
from kelp.kv.manager.stats import ManagerStats
from kelp.kv.manager.stores import Stores
from kelp.kv.tiers.base import BlockRecord

_log = logging.getLogger(__name__)
_SWEEPS_PER_TTL = 40
_MAX_SWEEP_S = 0.5
_SILENT_TTLS = 3.0
_FAREWELL_S = 2.0


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
        books = _book_parts(record, parts, sink, stats)
        self.host = HostTier(tiers.arena, config.kv_manager.lease_ttl_s, books)
        self.members = Members(agent, block_bytes, parts.clock)
        self._reads = PoolReads(agent, self.members, block_bytes, parts.clock)
        self.stores = Stores(self.host, self.members, self._reads, self._offer_below)
        rates = TierRates(block_bytes, parts.clock)
        above = Above(self.host, PromotionParts(self.host, rates))
        self._disk = DiskSide(tiers.disk, above, books, config.disk_tier) if tiers.disk is not None else None
        self._store: StoreSide | None = None
        if tiers.objects is not None:
            self._store = StoreSide(tiers.objects, above, self._disk, sink, config.object_tier)
        self._below: list[DiskSide | StoreSide] = [side for side in (self._disk, self._store) if side is not None]
        self.clearing = Clearing(self.host, self.stores, self._disk, self._store, tiers.journal)
        promotions = {side.promotions.tier: side.promotions for side in self._below}
        self.onboarding = Onboarding(
            self.host,
            self.disk,
            self._store.finder if self._store is not None else None,
            promotions,
            rates,
            on_used=self._offer_to_disk,
        )
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers that there are."""
        return (Tier.HOST, *(side.promotions.tier for side in self._below))

    @property
    def disk(self) -> TierBooks | None:
        """Books of the disk tier."""
        return self._disk.books if self._disk is not None else None

    @property
    def disk_writes(self) -> DiskWrites | None:
        """What is on its way to the disk."""
        return self._disk.writes if self._disk is not None else None

    @property
    def object_writes(self) -> ObjectWrites | None:
        """What is on its way to the object store."""
        return self._store.writes if self._store is not None else None

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
        await self.clearing.load()
        num_recovered = await self.host.recover(lambda: self.clearing.inherited(Tier.HOST))
        if num_recovered:
            _log.info("%d KV blocks of an earlier process are in the host tier", num_recovered)
        loops = [self._sweep_forever(), self._check_recovered(), self.clearing.finish()]
        if self._disk is not None:
            loops += self._disk.loops(lambda: self.clearing.inherited(Tier.DISK), self._found_on_disk)
        if self._store is not None:
            loops += self._store.loops(self.clearing.reached)
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
            "unverified": self.host.num_unverified, "quarantined": sum(len(side.quarantine) for side in self._below),
            "clears": len(self.clearing),
        }  # fmt: skip
        for kind, count in held.items():
            stats.set(KV_MANAGER_HELD, count, kind=kind)
        stats.set(KV_TIER_QUEUE, self.stores.num_coming, tier="host", direction="write")
        stats.set(KV_TIER_QUEUE, self.host.leases.num_slots, tier="host", direction="read")
        for side in self._below:
            side.report(stats)
            tier = side.promotions.tier.name.lower()
            stats.set(KV_TIER_QUEUE, side.promotions.num_waiting, tier=tier, direction="read")

    def _offer_below(self, records: Sequence[BlockRecord]) -> None:
        self._offer_to_disk(records)
        if self.object_writes is not None:
            self.object_writes.offer(records)

    def _offer_to_disk(self, records: Sequence[BlockRecord]) -> None:
        if self.disk_writes is not None:
            self.disk_writes.offer(records)

    def _found_on_disk(self) -> None:
        # They may be missing in the store.
        if self.object_writes is not None:
            self.object_writes.missed.set()

    async def _check_recovered(self) -> None:
        while self.host.num_unverified:
            self._offer_below(await self.host.verify_some())

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(min(self.host.leases.ttl_s / _SWEEPS_PER_TTL, _MAX_SWEEP_S))
            self.sweep()
            await self.clearing.sweep()
            self.report()
            for side in self._below:
                await side.quarantine.sweep()

    def _close_threads(self, is_kept: bool) -> None:
        self.members.close()
        self._reads.close()
        self.host.background.close()
        self.host.thread.close()
        for side in self._below:
            side.thread.close()
        self._agent.close()
        self._tiers.close(is_kept)
        if self.publisher is not None:
            self.publisher.close()


def _book_parts(record: SpaceRecord, parts: ManagerParts, sink: KVEventSink, stats: ManagerStats) -> BookParts:
    config = parts.config.kv_manager
    return BookParts(
        make_policy=parts.make_policy,
        limits=ShelfLimits(config.tenant_share, config.max_pinned_share),
        recompute_s=recompute_cost(record.block_size),
        block_bytes=block_bytes_of(record),
        sink=sink,
        stats=stats,
        clock=parts.clock,
    )


def _publisher(epoch: str, block_size: int, parts: ManagerParts) -> EventPublisher:
    changes = {"port": parts.config.kv_manager.port, "replay_port": 0}
    return EventPublisher(epoch, block_size, parts.config.events.model_copy(update=changes), parts.clock, parts.token)


async def _supervised(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:
        _log.exception("background work of the KV block manager has ended; it serves on without")
