"""Leasing the longest known run of a prompt's blocks, wherever it lies; its reader hears as blocks become ready."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence

from kelp.core.errors import KelpError
from kelp.core.kv_manager_messages import Leased, Match, Matched, Onboard
from kelp.core.kv_manager_values import SlotRef, TierRun
from kelp.core.metrics import KV_TIER_HITS, KV_TIER_MISSES
from kelp.core.types import SequenceHash, Tier, WorkerKey
from kelp.kv.manager.books import TierBooks
from kelp.kv.manager.host import HostTier
from kelp.kv.manager.leases import Lease
from kelp.kv.manager.promotions import Promotions
from kelp.kv.manager.rates import Recompute, TierRates, num_worth_bringing
from kelp.kv.manager.threads import TierThread
from kelp.kv.tiers.base import BlockRecord, ObjectTier

_FIND_TIMEOUT_S = 0.25
"""How long an answer may wait for the object store to say what it has."""


class Bringing:
    """One onboarding, as long as its lease lives.

    Attributes:
        num_blocks: Leading blocks that will come.
        ready: Of those, the leading ones that can be read.
        tiers: Where each of them was found.
        start_s: When it was asked for.
    """

    def __init__(self, host: HostTier, lease: Lease, tiers: Sequence[Tier], deadline_s: float) -> None:
        self._host = host
        self.lease = lease
        self.start_s = host.clock.monotonic_s()
        self.num_blocks = len(tiers)
        self.ready: list[SlotRef] = []
        self.tiers = tuple(tiers)
        self._arrived: dict[int, SlotRef] = {}
        self._deadline_s = deadline_s
        self._has_news = asyncio.Event()
        lease.on_end = self._has_news.set

    @property
    def is_complete(self) -> bool:
        """Whether nothing more comes."""
        return len(self.ready) >= self.num_blocks or not self.lease.is_live

    def take(self, index: int, slot: int | None) -> None:
        """Block `index` lies in a slot that may be held now, or does not come."""
        if not self.lease.is_live or index >= self.num_blocks:
            return
        if slot is None:
            self.num_blocks = index
        else:
            self._host.shelf.hold(slot)
            self.lease.slots.append(slot)
            self._arrived[index] = self._host.reference(slot)
            while (reference := self._arrived.pop(len(self.ready), None)) is not None:
                self.ready.append(reference)
        self._has_news.set()

    def give_up_late(self, now_s: float) -> None:
        """What is not ready by the deadline is not wanted."""
        if now_s >= self._deadline_s and not self.is_complete:
            self.num_blocks = len(self.ready)
            self._has_news.set()

    async def wait(self, num_known: int) -> None:
        """Wait until more than `num_known` blocks are ready, or nothing more comes."""
        while len(self.ready) <= num_known and not self.is_complete:
            self._has_news.clear()
            await self._has_news.wait()

    def answer(self, num_known: int) -> Leased:
        """How it stands."""
        tiers = self.tiers[: self.num_blocks]
        counts = [tiers.count(tier) for tier in Tier]
        return Leased(self.num_blocks, tuple(self.ready[num_known : self.num_blocks]), tuple(counts), _runs(tiers))


def _runs(tiers: Sequence[Tier]) -> tuple[TierRun, ...]:
    if list(tiers) == sorted(tiers):
        return ()
    return tuple(TierRun(tier, len(list(run))) for tier, run in itertools.groupby(tiers))


class _Place:
    """One block of a `Bringing`; implements `promotions.Arrival`."""

    def __init__(self, bringing: Bringing, index: int) -> None:
        self._bringing = bringing
        self._index = index

    @property
    def is_wanted(self) -> bool:
        """See `Arrival`."""
        return self._bringing.lease.is_live and self._index < self._bringing.num_blocks

    def arrive(self, slot: int | None) -> None:
        """See `Arrival`."""
        self._bringing.take(self._index, slot)


class ObjectFinder:
    """Asks the object store what it has, without letting it keep anybody waiting."""

    def __init__(self, objects: ObjectTier, thread: TierThread) -> None:
        self._objects = objects
        self._thread = thread

    async def find(self, hashes: Sequence[SequenceHash], first_position: int, tenant: bytes) -> int:
        """How many leading blocks the store has, as far as it says so in time."""
        if not self._objects.is_available or self._thread.num_waiting > 1:
            return 0
        asking = self._thread.start(self._objects.find, list(hashes), first_position, tenant)
        done, _ = await asyncio.wait({asking}, timeout=_FIND_TIMEOUT_S)
        if not done or isinstance(asking.exception(), KelpError):
            return 0
        return asking.result()


class Onboarding:
    """All onboardings of a space; belongs to one event loop.

    Args:
        on_used: Told of blocks of the host tier that were asked for.
    """

    def __init__(
        self,
        host: HostTier,
        disk: TierBooks | None,
        finder: ObjectFinder | None,
        promotions: Mapping[Tier, Promotions],
        rates: TierRates,
        on_used: Callable[[Sequence[BlockRecord]], None],
    ) -> None:
        self._host = host
        self._on_used = on_used
        self._disk = disk
        self._finder = finder
        self._promotions = promotions
        self._rates = rates
        self._live: dict[Lease, Bringing] = {}

    def get(self, key: WorkerKey, lease_id: int) -> Bringing | None:
        """A live onboarding."""
        lease = self._host.leases.get(key, lease_id)
        return None if lease is None else self._live.get(lease)

    async def onboard(self, key: WorkerKey, operation: Onboard) -> Leased:
        """Lease what pays.

        Raises:
            ProtocolError: The lease id is in use.
        """
        lease = self._host.leases.open(key, operation.lease_id)
        try:
            hashes = [SequenceHash(name) for name in operation.hashes]
            tiers = await self._match(hashes, operation.first_position, operation.tenant)
            recompute = Recompute(len(hashes), operation.recompute_s, operation.quadratic_share)
            num_blocks = num_worth_bringing(tiers, recompute, self._rates)
            deadline_s = self._host.clock.monotonic_s() + operation.timeout_s
            bringing = Bringing(self._host, lease, tiers[:num_blocks], deadline_s)
            self._count(bringing, len(hashes) - len(tiers))
            self._bring(bringing, hashes, operation)
        except BaseException:
            self._host.leases.end(lease)
            raise
        answer = bringing.answer(0)
        if not bringing.num_blocks:
            self._host.leases.end(lease)
        else:
            self._live[lease] = bringing
        return answer

    def note_read(self, leases: Sequence[Lease], num_blocks: int, seconds: float) -> None:
        """What a worker says of its READs under leases that it gives back; more than these allow is not believed."""
        now_s = self._host.clock.monotonic_s()
        start_s = min((self._live[lease].start_s for lease in leases if lease in self._live), default=now_s)
        num_blocks = min(num_blocks, sum(len(lease.slots) for lease in leases))
        seconds = min(seconds, now_s - start_s)
        if num_blocks and seconds > 0:
            self._rates.observe(Tier.HOST, num_blocks, seconds)
            self._host.stats.moved(Tier.HOST, "read", num_blocks * self._host.block_bytes, seconds)

    async def match(self, operation: Match) -> Matched:
        """Where the longest known run lies now; nothing is held, and nothing counts as used."""
        hashes = [SequenceHash(name) for name in operation.hashes]
        found = await self._match(hashes, operation.first_position, operation.tenant)
        return Matched(tuple(found.count(tier) for tier in Tier))

    def sweep(self) -> None:
        """Forget what is over; give up what is late."""
        now_s = self._host.clock.monotonic_s()
        self._live = {lease: bringing for lease, bringing in self._live.items() if lease.is_live}
        for bringing in self._live.values():
            bringing.give_up_late(now_s)

    async def _match(self, hashes: Sequence[SequenceHash], first_position: int, tenant: bytes | None) -> list[Tier]:
        """Where the leading known blocks lie; those of the host tier have been verified. No tenant: no store."""
        local = self._local_run(hashes, 0)
        await self._host.verify(hashes[: len(local)])
        local = self._local_run(hashes, 0)
        begin = len(local)
        if begin == len(hashes) or self._finder is None or tenant is None:
            return local
        num_found = await self._finder.find(hashes[begin:], first_position + begin, tenant)
        if not num_found:
            return self._local_run(hashes, 0)
        found = [self._local_tier(name) or Tier.OBJECT for name in hashes[begin : begin + num_found]]
        tail = self._local_run(hashes, begin + num_found)
        await self._host.verify(hashes[begin : begin + num_found + len(tail)])
        # Nothing was held while others were asked: what has gone meanwhile ends the run.
        head = self._local_run(hashes[:begin], 0)
        if len(head) < begin:
            return head
        return [*head, *found, *self._local_run(hashes, begin + num_found)]

    def _local_run(self, hashes: Sequence[SequenceHash], begin: int) -> list[Tier]:
        run: list[Tier] = []
        for index in range(begin, len(hashes)):
            tier = self._local_tier(hashes[index])
            if tier is None:
                break
            run.append(tier)
        return run

    def _local_tier(self, name: SequenceHash) -> Tier | None:
        if name in self._host.shelf:
            return Tier.HOST
        return Tier.DISK if self._disk is not None and name in self._disk.shelf else None

    def _bring(self, bringing: Bringing, hashes: Sequence[SequenceHash], operation: Onboard) -> None:
        """Hold what is there, all at once, before room is made for what is to come."""
        below: list[int] = []
        used: list[BlockRecord] = []
        for index in range(bringing.num_blocks):
            slot = self._host.shelf.slot(hashes[index])
            if slot is None or self._host.is_unverified(hashes[index]):
                below.append(index)
                continue
            self._host.shelf.hit(hashes[index])
            bringing.take(index, slot)
            used.append(self._host.shelf.record(slot))
        self._on_used(used)
        for index in below:
            self._bring_up(bringing, index, hashes[index], operation)

    def _bring_up(self, bringing: Bringing, index: int, name: SequenceHash, operation: Onboard) -> None:
        tier, tenant = bringing.tiers[index], operation.tenant
        if tier is Tier.HOST or index >= bringing.num_blocks:
            # It left the host tier since it was found there.
            bringing.take(index, None)
            return
        if tier is Tier.DISK:
            slot = self._disk.shelf.slot(name) if self._disk is not None else None
            if slot is None or self._disk is None:
                bringing.take(index, None)
                return
            tenant = self._disk.shelf.record(slot).tenant
        self._promotions[tier].bring(name, operation.first_position + index, tenant, _Place(bringing, index))

    def _count(self, bringing: Bringing, num_missing: int) -> None:
        for tier in Tier:
            self._host.stats.add(KV_TIER_HITS, bringing.tiers.count(tier), tier=tier.name.lower())
        self._host.stats.add(KV_TIER_MISSES, num_missing)
