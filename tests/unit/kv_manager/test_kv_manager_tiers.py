"""Blocks going down and coming back up, and what a dead manager leaves behind."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
from fake_tiers import StoreMemory
from manager_rig import TENANT, Host, Worker, content_of, prompt_hashes, settled, space_of

from kelp.core.clock import FakeClock
from kelp.core.kv_manager_messages import Await, Done, GetStats, Leased, Onboard, Stats, Unknown
from kelp.core.types import Tier
from kelp.kv.manager.states import SlotState
from support.waiting import until

HASHES = prompt_hashes(6)


def run(scene) -> None:
    asyncio.run(scene())


async def stats(worker: Worker) -> dict[str, float]:
    answer = await worker.ask(GetStats())
    assert isinstance(answer, Stats)
    return answer.values


def test_what_the_host_tier_lost_comes_back_from_disk():
    async def scene():
        async with Host(num_slots=6, num_disk_slots=32).manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
            await worker.store(prompt_hashes(6, first_token=500))
            # A slot that is being written to disk makes room for nobody.
            await settled(manager)
            lease_id, leased = await worker.onboard(HASHES)
            assert leased.tiers == (0, 0, 6, 0)
            assert worker.read(leased) == [content_of(name) for name in HASHES]
            await worker.release(lease_id)

    run(scene)


def test_a_prompt_is_brought_from_several_tiers_at_once():
    async def scene():
        host = Host(num_slots=8, num_disk_slots=4, store=StoreMemory(2))
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
            space = space_of(manager)
            # Keeps the first two in the host tier, the next two on disk, and the last two in the store alone.
            space.host.shelf.clear(None)
            await space.host.wiped()
            await worker.store(HASHES[:2])
            await settled(manager)
            assert space.disk is not None
            for name in HASHES:
                if name not in HASHES[2:4]:
                    space.disk.shelf.remove(name, "evicted")
            on_disk = [name in space.disk.shelf for name in HASHES]
            _, leased = await worker.onboard(HASHES)
            assert worker.read(leased) == [content_of(name) for name in HASHES]
            assert leased.tiers == (0, 2, sum(on_disk), 4 - sum(on_disk))

    run(scene)


def test_another_host_finds_in_the_store_what_it_never_computed():
    async def scene():
        store = StoreMemory(2)
        async with Host(store=store).manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
        async with Host(store=store).manager() as manager:
            worker = Worker(manager)
            await worker.join()
            _, leased = await worker.onboard(HASHES)
            assert leased.tiers == (0, 0, 0, 6)
            assert worker.read(leased) == [content_of(name) for name in HASHES]

    run(scene)


def test_only_whole_groups_go_to_the_store_also_when_their_last_block_comes_first():
    async def scene():
        store = StoreMemory(2)
        async with Host(store=store).manager() as manager:
            worker = Worker(manager)
            await worker.join()
            last_first = worker.store_operation(HASHES[:4], first=3)
            await worker.ask(last_first)
            await worker.commit(last_first.store_id)
            await settled(manager)
            assert store.blocks == {}
            await worker.store(HASHES[:3])
            await settled(manager)
            assert {name for _, name in store.blocks} == set(HASHES[:4])

    run(scene)


def test_damage_on_disk_ends_the_run_and_is_counted():
    async def scene():
        host = Host(num_slots=6, num_disk_slots=32)
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
            await worker.store(prompt_hashes(6, first_token=500))
            # A slot that is being written to disk makes room for nobody.
            await settled(manager)
            assert host.disk is not None
            host.disk.damage(HASHES[3])
            _, leased = await worker.onboard(HASHES)
            assert leased.num_blocks == 3
            assert worker.read(leased) == [content_of(name) for name in HASHES[:3]]
            assert (await stats(worker))['kelp_kv_tier_corrupt_blocks_total{tier="disk"}'] == 1

    run(scene)


def test_two_prompts_that_want_the_same_block_share_one_promotion():
    async def scene():
        host = Host(num_slots=6, num_disk_slots=32)
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
            await worker.store(prompt_hashes(6, first_token=500))
            # A slot that is being written to disk makes room for nobody.
            await settled(manager)
            operations = [worker.onboard_operation(HASHES) for _ in range(2)]
            first, second = await manager.answer(operations)
            assert isinstance(first, Leased) and isinstance(second, Leased)
            for operation in operations:
                waiting = Await("w", "e1", operation.lease_id, 5)
                await worker.ask(waiting)
            space = space_of(manager)
            await until(lambda: space.host.shelf.slots.num_references == 12, "both hold all six")
            assert (await stats(worker))['kelp_kv_tier_moved_bytes_total{direction="read",tier="disk"}'] == 6 * 64

    run(scene)


def test_what_does_not_come_in_time_is_given_up():
    async def scene():
        clock, gate = FakeClock(), threading.Event()
        host = Host(num_slots=6, num_disk_slots=32, clock=clock)
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
            await worker.store(prompt_hashes(6, first_token=500))
            # A slot that is being written to disk makes room for nobody.
            await settled(manager)
            space = space_of(manager)
            assert space.disk is not None
            stuck = space.disk.thread.start(gate.wait)
            operation = worker.onboard_operation(HASHES, timeout_s=2.0)
            leased = await worker.ask(operation)
            assert isinstance(leased, Leased) and (leased.num_blocks, leased.ready) == (6, ())
            waiting = asyncio.ensure_future(worker.ask(Await("w", "e1", operation.lease_id, 0)))
            await asyncio.sleep(0)
            clock.advance(2.0)
            space.sweep()
            assert await waiting == Leased(0, (), (0, 0, 0, 0))
            gate.set()
            await stuck

    run(scene)


def test_the_lease_that_ends_while_blocks_come_leaves_no_reference():
    async def scene():
        gate = threading.Event()
        host = Host(num_slots=6, num_disk_slots=32)
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
            await worker.store(prompt_hashes(6, first_token=500))
            # A slot that is being written to disk makes room for nobody.
            await settled(manager)
            space = space_of(manager)
            assert space.disk is not None
            stuck = space.disk.thread.start(gate.wait)
            operation = worker.onboard_operation(HASHES)
            await worker.ask(operation)
            waiting = asyncio.ensure_future(worker.ask(Await("w", "e1", operation.lease_id, 0)))
            await asyncio.sleep(0)
            await worker.release(operation.lease_id)
            assert await waiting == Unknown("lease")
            gate.set()
            await stuck
            slots = space.host.shelf.slots
            await until(lambda: not slots.count(SlotState.FILLING), "nothing on its way")
            assert slots.num_references == 0

    run(scene)


def test_slots_that_a_failed_read_may_still_touch_are_kept_out_of_use():
    async def scene():
        host = Host(num_slots=6, num_disk_slots=32)
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
            await worker.store(prompt_hashes(6, first_token=500))
            # A slot that is being written to disk makes room for nobody.
            await settled(manager)
            assert host.disk is not None and host.disk_memory is not None
            host.disk_memory.slots.clear()
            host.disk.stuck = set(range(6))
            _, leased = await worker.onboard(HASHES)
            assert leased.num_blocks == 0
            space = space_of(manager)
            await until(lambda: space.host.shelf.slots.count(SlotState.FILLING) == 6, "all in quarantine")
            host.disk.stuck = set()
            for side in space._below:
                await side.quarantine.sweep()
            assert space.host.shelf.slots.count(SlotState.FREE) == 6

    run(scene)


def test_a_disk_that_takes_nothing_costs_nothing_but_its_tier():
    async def scene():
        host = Host(num_disk_slots=32)
        assert host.disk_memory is not None
        host.disk_memory.num_failing_writes = 1
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            assert await worker.store(HASHES) == Done(6)
            await settled(manager)
            space = space_of(manager)
            assert space.disk is not None and len(space.disk.shelf) == 0
            await until(lambda: space.host.shelf.slots.num_references == 0, "sources let go")
            assert (await stats(worker))['kelp_kv_tier_refused_total{reason="failed",tier="disk"}'] == 6

    run(scene)


def test_blocks_rarely_offered_do_not_wear_the_disk():
    async def scene():
        host = Host(num_disk_slots=32, settings={"disk_tier.min_offers": "2"})
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
            assert host.disk is not None and host.disk.num_writes == 0
            await worker.onboard(HASHES[:2])
            await settled(manager)
            assert host.disk.num_writes == 2, "asked for once more"

    run(scene)


def test_what_a_killed_manager_had_committed_is_found_again_and_damage_is_not():
    async def scene():
        host = Host()
        async with host.manager(is_kept=True) as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            torn = space_of(manager).host.shelf.slot(HASHES[4])
            uncommitted = worker.store_operation(prompt_hashes(1, first_token=700))
            await worker.ask(uncommitted)
        assert torn is not None
        host.memory.pool[torn] = np.frombuffer(b"torn" * 16, dtype=np.uint8)
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            _, leased = await worker.onboard(HASHES)
            assert leased.num_blocks == 4
            assert worker.read(leased) == [content_of(name) for name in HASHES[:4]]
            assert (await worker.onboard(prompt_hashes(1, first_token=700)))[1].num_blocks == 0
            await until(lambda: space_of(manager).host.num_unverified == 0, "all looked at")

    run(scene)


def test_the_disk_is_found_again_when_the_host_tier_is_gone():
    async def scene():
        host = Host(num_disk_slots=16)
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            space = space_of(manager)
            await until(lambda: space.disk is not None and len(space.disk.shelf) == 6, "the disk has been read")
            _, leased = await worker.onboard(HASHES)
            assert leased.tiers == (0, 0, 6, 0)
            assert worker.read(leased) == [content_of(name) for name in HASHES]

    run(scene)


def test_what_costs_more_to_bring_than_to_compute_is_left_where_it_is():
    async def scene():
        host = Host(num_slots=6, num_disk_slots=32)
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
            operation = Onboard("w", "e1", 1, TENANT, tuple(HASHES), 0, 1e-6, 5.0)
            assert await worker.ask(operation) == Leased(0, (), (0, 0, 0, 0))
            assert Tier.HOST in (await worker.join()).tiers
            assert len(space_of(manager).host.leases) == 0

    run(scene)
