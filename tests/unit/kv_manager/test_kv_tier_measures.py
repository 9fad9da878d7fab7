"""What the manager measures of its tiers: for operators by metrics, for itself by rates."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from fake_tiers import StoreMemory
from manager_rig import BLOCK_BYTES, TENANT, Host, Worker, prompt_hashes, settled, space_of

from kelp.core.clock import FakeClock
from kelp.core.errors import ProtocolError
from kelp.core.kv_manager_messages import (
    GetStats,
    Leased,
    Onboard,
    Release,
    Stats,
    TierRun,
    decode_operations,
    encode_batch,
)
from kelp.core.metrics import KV_TIER_MOVED, KV_TIER_SECONDS
from kelp.core.types import SequenceHash, Tier
from kelp.kv.manager.rates import Recompute, TierRates, num_worth_bringing
from support.waiting import until

HASHES = prompt_hashes(4)
TIERS = ("host", "disk", "object")
LOWER = {"disk": Tier.DISK, "object": Tier.OBJECT}


def run(scene) -> None:
    asyncio.run(scene())


class Held:
    """A method of a tier whose calls wait until the test lets them go on."""

    def __init__(self, tier: object, name: str) -> None:
        self._call: Callable[..., Any] = getattr(tier, name)
        self.has_begun = threading.Event()
        self._may_go_on = threading.Event()
        setattr(tier, name, self)

    def __call__(self, *arguments: object) -> object:
        self.has_begun.set()
        self._may_go_on.wait(30.0)
        return self._call(*arguments)

    async def begun(self) -> None:
        await until(self.has_begun.is_set, "a call of a tier")

    def go_on(self) -> None:
        self._may_go_on.set()


async def counts(worker: Worker) -> dict[str, float]:
    answer = await worker.ask(GetStats())
    assert isinstance(answer, Stats)
    return answer.values


async def queued(worker: Worker, tier: str, direction: str) -> float:
    return (await counts(worker))[f'kelp_kv_tier_queue_blocks{{direction="{direction}",tier="{tier}"}}']


async def lease(worker: Worker, hashes: Sequence[SequenceHash], first: int = 0, **fields: float) -> tuple[int, Leased]:
    operation = Onboard("w", "e1", worker.new_id(), TENANT, tuple(hashes), first, fields.pop("recompute_s", 0.0), 30.0)
    leased = await worker.ask(msgspec.structs.replace(operation, **fields))
    assert isinstance(leased, Leased), leased
    return operation.lease_id, leased


async def stored_with_a_look_at_the_queues(host: Host, manager, worker: Worker) -> None:
    """The blocks lie in all tiers, and on the way there each tier had two that waited."""
    assert host.disk is not None and host.objects is not None
    writes = {"disk": Held(host.disk, "write"), "object": Held(host.objects, "put_groups")}
    await worker.store(HASHES[:2])
    for held in writes.values():
        await held.begun()
    stalled = host.faults.stall(host.faults.num_reads)
    storing = asyncio.ensure_future(worker.store(HASHES))
    await until(stalled.is_posted.is_set, "the READ")
    assert await queued(worker, "host", "write") == 2
    stalled.resume()
    await storing
    assert await queued(worker, "host", "write") == 0
    for tier, held in writes.items():
        assert await queued(worker, tier, "write") == 2
        held.go_on()
    await settled(manager)
    values = await counts(worker)
    for tier in TIERS:
        assert await queued(worker, tier, "write") == 0
        assert values[f'kelp_kv_tier_bytes{{tier="{tier}"}}'] == 4 * BLOCK_BYTES


async def brought_with_a_look_at_the_queue(host: Host, manager, worker: Worker, tier: str) -> None:
    """The blocks come up from a lower tier, of which two have to wait."""
    space = space_of(manager)
    space.host.shelf.clear(None)
    await space.host.wiped()
    if tier == "object":
        assert space.disk is not None
        for name in HASHES:
            space.disk.shelf.remove(name, "evicted")
    held = Held(host.disk, "read") if tier == "disk" else Held(host.objects, "get")
    one, leased = await lease(worker, HASHES[:2])
    assert leased.tiers[LOWER[tier]] == 2
    await held.begun()
    if tier == "object":
        # The tier's thread is busy, so nobody would be told what the store has: they are known to be there.
        bringing = space.onboarding._promotions[Tier.OBJECT]
        arrival = _Nobody()
        for position in (2, 3):
            bringing.bring(HASHES[position], position, TENANT, arrival)
        two = None
    else:
        two, _ = await lease(worker, HASHES[2:], 2)
    assert await queued(worker, tier, "read") == 2
    held.go_on()
    await until(lambda: all(name in space.host.shelf for name in HASHES), "the blocks")
    assert await queued(worker, tier, "read") == 0
    await worker.release(*(lease_id for lease_id in (one, two) if lease_id is not None))


class _Nobody:
    is_wanted = True

    def arrive(self, slot: int | None) -> None:
        pass


def test_every_tier_shows_its_hits_bytes_times_evictions_and_queues():
    async def scene():
        store = StoreMemory(2)
        host = Host(num_slots=6, num_disk_slots=4, store=store, settings={"object_tier.refresh_s": "0.05"})
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await stored_with_a_look_at_the_queues(host, manager, worker)
            lease_id, leased = await lease(worker, HASHES)
            assert leased.tiers == (0, 4, 0, 0)
            assert await queued(worker, "host", "read") == 4
            await worker.release(lease_id, num_read=4, read_s=1e-6)
            assert await queued(worker, "host", "read") == 0
            for tier in LOWER:
                await brought_with_a_look_at_the_queue(host, manager, worker, tier)
            await worker.store(prompt_hashes(6, first_token=1000))
            await settled(manager)
            store.blocks.clear()
            await until(lambda: not len(space_of(manager)._store._names), "the next listing of the store")
            values = await counts(worker)
            _, _, observations = host.metrics.take()
            for tier in TIERS:
                assert values[f'kelp_kv_tier_hits_total{{tier="{tier}"}}'] >= 2
                assert values[f'kelp_kv_tier_removed_total{{reason="evicted",tier="{tier}"}}'] >= 4
                for direction in ("read", "write"):
                    assert values[f'{KV_TIER_MOVED.name}{{direction="{direction}",tier="{tier}"}}'] >= 4 * BLOCK_BYTES
                    labels = (("direction", direction), ("tier", tier))
                    assert observations[KV_TIER_SECONDS, labels]

    run(scene)


def test_what_workers_say_of_their_reads_decides_what_is_brought_from_the_host_tier():
    async def scene():
        clock = FakeClock()
        async with Host(clock=clock).manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)

            async def num_brought() -> int:
                lease_id, leased = await lease(worker, HASHES, recompute_s=0.02)
                await worker.release(lease_id)
                return leased.num_blocks

            assert await num_brought() == 4, "as fast as memory is taken to be"
            for _ in range(12):
                one, _ = await lease(worker, HASHES)
                clock.advance(0.1)
                await worker.release(one, num_read=4, read_s=0.1)
            assert await num_brought() == 0, "longer than computing"
            for _ in range(20):
                one, _ = await lease(worker, HASHES)
                clock.advance(0.1)
                await worker.release(one, num_read=4, read_s=0.001)
            assert await num_brought() == 4
            values = await counts(worker)
            assert values['kelp_kv_tier_moved_bytes_total{direction="read",tier="host"}'] == 32 * 4 * BLOCK_BYTES

    run(scene)


def test_of_what_a_worker_says_of_its_reads_no_more_counts_than_its_lease_allows():
    async def scene():
        clock = FakeClock()
        async with Host(clock=clock).manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            host_s = space_of(manager).onboarding._rates.seconds
            before_s = host_s(Tier.HOST, 4)
            await worker.release(99, num_read=4, read_s=5.0)
            one, _ = await lease(worker, HASHES)
            await worker.release(one, num_read=4, read_s=0.0)
            assert host_s(Tier.HOST, 4) == before_s, "of no lease, and in no time"
            two, _ = await lease(worker, HASHES)
            clock.advance(2 * before_s)
            await worker.release(two, two, num_read=2**31 - 1, read_s=86400.0)
            assert host_s(Tier.HOST, 4) == pytest.approx(2 * before_s)
            values = await counts(worker)
            assert values['kelp_kv_tier_moved_bytes_total{direction="read",tier="host"}'] == 4 * BLOCK_BYTES

    run(scene)


@pytest.mark.parametrize("read_s", [float("nan"), float("inf"), -1.0, 1e9])
def test_times_that_make_no_sense_are_refused(read_s):
    with pytest.raises(ProtocolError, match="read_s"):
        decode_operations(encode_batch([Release("w", "e", (1,), (), 1, read_s)]))


def test_a_prompt_whose_fast_and_slow_blocks_are_mixed_says_in_which_order():
    async def scene():
        host = Host(num_slots=8, num_disk_slots=8)
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
            shelf = space_of(manager).host.shelf
            for name in HASHES[1:3]:
                shelf.remove(name, "evicted")
            _, leased = await lease(worker, HASHES)
            assert (leased.tiers, leased.num_blocks) == ((0, 2, 2, 0), 4)
            assert leased.runs == (TierRun(Tier.HOST, 1), TierRun(Tier.DISK, 2), TierRun(Tier.HOST, 1))
            _, leased = await lease(worker, HASHES[:3])
            assert leased.runs == (), "the faster lie first"

    run(scene)


def test_a_tier_that_was_slow_is_tried_again_when_it_has_been_left_alone():
    clock = FakeClock()
    rates = TierRates(BLOCK_BYTES, clock)
    fast_s = rates.seconds(Tier.DISK, 4)
    for _ in range(50):
        rates.observe(Tier.DISK, 4, 100 * fast_s)
        rates.observe(Tier.HOST, 4, 1e-9)
    assert rates.seconds(Tier.DISK, 4) == pytest.approx(100 * fast_s, rel=0.01)
    host_s = rates.seconds(Tier.HOST, 4)
    clock.advance(60.0)
    assert rates.seconds(Tier.DISK, 4) == pytest.approx(10 * fast_s, rel=0.01)
    assert rates.seconds(Tier.HOST, 4) == host_s, "a fast one stays so"
    clock.advance(1e9)
    assert rates.seconds(Tier.DISK, 4) == pytest.approx(fast_s)


@pytest.mark.parametrize("seconds", [1e-300, 1e300])
def test_no_measurement_makes_a_tier_infinitely_fast_or_slow(seconds):
    rates = TierRates(BLOCK_BYTES, FakeClock())
    prior_s = rates.seconds(Tier.HOST, 4)
    for _ in range(5000):
        rates.observe(Tier.HOST, 4, seconds)
    assert 1e-5 < rates.seconds(Tier.HOST, 4) / prior_s < 1e5


def test_the_leading_blocks_of_a_long_prompt_save_less_than_their_share():
    rates = TierRates(BLOCK_BYTES, FakeClock())
    tiers = [Tier.OBJECT] * 10
    bring_s = rates.bring_s(tiers)
    assert num_worth_bringing(tiers, Recompute(100, 11 * bring_s), rates) == 10
    assert num_worth_bringing(tiers, Recompute(100, 11 * bring_s, quadratic_share=0.5), rates) == 0
    assert num_worth_bringing(tiers * 10, Recompute(100, 11 * bring_s, quadratic_share=0.5), rates) == 100
