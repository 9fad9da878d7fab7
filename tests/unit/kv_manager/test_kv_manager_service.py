"""What workers see of the block manager."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from fake_tiers import StoreMemory
from manager_rig import SPACE, TENANT, Host, Worker, content_of, prompt_hashes, settled, space_of

from kelp.core.clock import FakeClock
from kelp.core.errors import FatalTransferError, ProtocolError
from kelp.core.hashing import tenant_digest
from kelp.core.kv_events import BlocksRemoved
from kelp.core.kv_manager_messages import (
    Await,
    Clear,
    Commit,
    Done,
    GetStats,
    Leased,
    OfferedBlock,
    Pin,
    Refused,
    Renew,
    Renewed,
    Stats,
    Stored,
    Unknown,
    decode_results,
    encode_batch,
)
from kelp.core.types import Tier
from support.waiting import until

HASHES = prompt_hashes(6)


def run(scene) -> None:
    asyncio.run(scene())


def test_what_one_worker_stores_another_onboards_byte_for_byte():
    async def scene():
        async with Host().manager() as manager:
            first, second = Worker(manager, "first"), Worker(manager, "second")
            await first.join()
            await second.join()
            assert await first.store(HASHES) == Done(6)
            lease_id, leased = await second.onboard(HASHES)
            assert (leased.num_blocks, leased.tiers) == (6, (0, 6, 0, 0))
            assert second.read(leased) == [content_of(name) for name in HASHES]
            assert await second.release(lease_id) == Done(1)
            assert space_of(manager).host.shelf.slots.num_references == 0

    run(scene)


def test_nobody_is_given_what_is_not_committed():
    async def scene():
        async with Host().manager() as manager:
            worker = Worker(manager)
            await worker.join()
            operation = worker.store_operation(HASHES)
            assert await worker.ask(operation) == Stored(6, 0)
            assert (await worker.onboard(HASHES))[1].num_blocks == 0
            assert await worker.commit(operation.store_id, is_valid=False) == Done(0)
            assert (await worker.onboard(HASHES))[1].num_blocks == 0
            assert await worker.commit(operation.store_id) == Unknown("store")
            assert len(space_of(manager).host.shelf.slots.in_state(space_of(manager).host.shelf.slots.state(0))) == 8

    run(scene)


def test_of_a_store_that_lost_blocks_the_others_are_given():
    async def scene():
        async with Host().manager() as manager:
            worker = Worker(manager)
            await worker.join()
            operation = worker.store_operation(HASHES)
            assert await worker.ask(operation) == Stored(6, 0)
            lost = (HASHES[3], HASHES[5])
            commit = Commit(worker.worker_id, worker.epoch, operation.store_id, lost=lost)
            assert await worker.ask(commit) == Done(4)
            assert (await worker.onboard(HASHES))[1].num_blocks == 3
            shelf = space_of(manager).host.shelf
            assert [name in shelf for name in HASHES] == [True, True, True, False, True, False]
            assert await worker.store(HASHES) == Done(2)

    run(scene)


@pytest.mark.parametrize("is_urgent", [False, True])
def test_urgent_stores_are_kept_like_others(is_urgent):
    async def scene():
        async with Host().manager() as manager:
            worker = Worker(manager)
            await worker.join()
            operation = msgspec.structs.replace(worker.store_operation(HASHES), is_urgent=is_urgent)
            assert await worker.ask(operation) == Stored(6, 0)
            assert await worker.commit(operation.store_id) == Done(6)
            assert (await worker.onboard(HASHES))[1].num_blocks == 6

    run(scene)


def test_known_blocks_are_not_read_again_and_a_full_tier_takes_fewer():
    async def scene():
        async with Host(num_slots=4).manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES[:2])
            lease_id, _ = await worker.onboard(HASHES[:2])
            assert await worker.ask(worker.store_operation(HASHES)) == Stored(2, 2), "two are known, two are held"
            await worker.release(lease_id)

    run(scene)


def test_a_store_that_is_never_committed_is_dropped_after_its_time():
    async def scene():
        clock = FakeClock()
        async with Host(clock=clock).manager() as manager:
            worker = Worker(manager)
            await worker.join()
            operation = worker.store_operation(HASHES, hold_s=5.0)
            await worker.ask(operation)
            clock.advance(14.9)
            space_of(manager).sweep()
            assert len(space_of(manager).stores) == 1
            clock.advance(0.2)
            space_of(manager).sweep()
            assert len(space_of(manager).stores) == 0
            assert await worker.commit(operation.store_id) == Unknown("store")

    run(scene)


def test_a_failed_read_is_refused_and_its_slots_come_back_once_the_worker_is_disconnected():
    async def scene():
        host = Host()
        host.faults.fail(0, FatalTransferError("gone"))
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            answer = await worker.ask(worker.store_operation(HASHES))
            assert isinstance(answer, Refused)
            assert "KELP_TRANSFER_FATAL" in answer.message
            slots = space_of(manager).host.shelf.slots
            await until(lambda: slots.count(slots.state(7)) == 8, "all slots free again")
            assert await worker.store(HASHES) == Done(6), "connected again"

    run(scene)


def test_a_read_that_hangs_is_given_up_in_time_and_can_never_write_into_a_slot_of_somebody_else():
    async def scene():
        host = Host()
        stalled = host.faults.stall(0)
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            answer = await worker.ask(worker.store_operation(HASHES, hold_s=0.05))
            assert isinstance(answer, Refused)
            assert "KELP_DEADLINE_EXCEEDED" in answer.message
            slots = space_of(manager).host.shelf.slots
            await until(lambda: slots.count(slots.state(7)) == 8, "all slots free again")
            assert await worker.store(HASHES) == Done(6)
            worker.pool[:] = 255
            stalled.resume()
            _, leased = await worker.onboard(HASHES)
            assert worker.read(leased) == [content_of(name) for name in HASHES]

    run(scene)


def test_who_has_not_joined_this_incarnation_is_told_so():
    async def scene():
        async with Host().manager() as manager:
            worker = Worker(manager)
            assert await worker.ask(worker.store_operation(HASHES)) == Unknown("worker")
            await worker.join()
            other = Worker(manager, worker.worker_id, "another epoch")
            assert await other.ask(Renew(other.worker_id, other.epoch, ())) == Unknown("worker")
            assert await worker.ask(Await(worker.worker_id, worker.epoch, 77, 0)) == Unknown("lease")

    run(scene)


def test_a_new_incarnation_of_a_worker_ends_what_the_old_one_held():
    async def scene():
        async with Host().manager() as manager:
            worker = Worker(manager, epoch="e1")
            await worker.join()
            await worker.store(HASHES[:3])
            await worker.onboard(HASHES[:3])
            await worker.ask(worker.store_operation(HASHES))
            again = Worker(manager, epoch="e2")
            await again.join()
            space = space_of(manager)
            assert (len(space.host.leases), len(space.stores), len(space.members)) == (0, 0, 1)
            assert space.host.shelf.slots.num_references == 0

    run(scene)


def test_a_silent_worker_is_forgotten_with_its_leases():
    async def scene():
        clock = FakeClock()
        async with Host(clock=clock).manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            lease_id, _ = await worker.onboard(HASHES)
            clock.advance(9)
            assert await worker.ask(Renew("w", "e1", (lease_id,))) == Renewed((lease_id,))
            clock.advance(31)
            space_of(manager).sweep()
            assert len(space_of(manager).members) == 0
            assert space_of(manager).host.shelf.slots.num_references == 0
            assert await worker.ask(Renew("w", "e1", (lease_id,))) == Unknown("worker")

    run(scene)


@pytest.mark.parametrize(("field", "value"), [("model_id", "other"), ("dtype", "bfloat16"), ("hash_version", 9)])
def test_a_worker_of_another_space_is_refused_by_the_field_that_differs(field, value):
    async def scene():
        async with Host().manager() as manager:
            await Worker(manager, "first").join()
            second = Worker(manager, "second")
            answer = await second.ask(second.join_operation(msgspec.structs.replace(SPACE, **{field: value})))
            assert isinstance(answer, Refused)
            assert f"space.{field} is {value!r}" in answer.message

    run(scene)


def test_the_manager_changes_over_once_nobody_of_the_old_space_is_alive():
    async def scene():
        clock = FakeClock()
        async with Host(clock=clock).manager() as manager:
            first, second = Worker(manager, "first"), Worker(manager, "second")
            await first.join()
            await first.store(HASHES)
            clock.advance(31)
            space_of(manager).sweep()
            epoch = manager.epoch
            await second.join(msgspec.structs.replace(SPACE, model_id="other"))
            assert manager.epoch != epoch
            assert (await second.onboard(HASHES))[1].num_blocks == 0

    run(scene)


def test_a_pool_that_makes_no_sense_is_refused_by_its_field():
    async def scene():
        async with Host().manager() as manager:
            worker = Worker(manager)
            operation = worker.join_operation()
            for change, word in (({"block_bytes": 32}, "block_bytes"), ({"stride_bytes": 8}, "stride_bytes")):
                pool = msgspec.structs.replace(operation.pool, **change)
                answer = await worker.ask(msgspec.structs.replace(operation, pool=pool))
                assert isinstance(answer, Refused)
                assert f"pool.{word}" in answer.message

    run(scene)


def test_offers_outside_the_pool_are_refused():
    async def scene():
        async with Host().manager() as manager:
            worker = Worker(manager)
            await worker.join()
            operation = worker.store_operation(HASHES[:1])
            bad = msgspec.structs.replace(operation, blocks=(OfferedBlock(HASHES[0], b"", 0, 32),))
            answer = await worker.ask(bad)
            assert isinstance(answer, Refused)
            assert "block_id 32 is outside the pool of 32 blocks" in answer.message

    run(scene)


def test_more_operations_than_allowed_are_refused_as_overload():
    async def scene():
        async with Host(settings={"kv_manager.max_operations": "2"}).manager() as manager:
            results = await manager.answer([GetStats()] * 3)
            assert [type(result) for result in results] == [Stats] * 3, "quick ones are not under way together"
            worker = Worker(manager)
            await worker.join()
            stores = [worker.store_operation(prompt_hashes(1, first_token=40 * index)) for index in range(3)]
            answers = await manager.answer(stores)
            assert [type(answer) for answer in answers] == [Stored, Stored, Refused]
            assert "KELP_OVERLOADED" in answers[2].message

    run(scene)


def test_a_block_found_damaged_by_its_reader_is_never_given_again():
    async def scene():
        async with Host().manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            lease_id, _ = await worker.onboard(HASHES)
            await worker.release(lease_id, corrupt=[HASHES[2]])
            assert (await worker.onboard(HASHES))[1].num_blocks == 2

    run(scene)


def test_pins_count_what_is_there():
    async def scene():
        async with Host().manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES[:2])
            assert await worker.ask(Pin(tuple(HASHES), 60.0)) == Done(2)
            assert space_of(manager).host.shelf.num_pins == 2
            await worker.ask(Pin(tuple(HASHES), 0.0))
            assert space_of(manager).host.shelf.num_pins == 0

    run(scene)


def test_clearing_a_tenant_removes_it_from_every_tier_and_leaves_the_others():
    async def scene():
        host = Host(num_slots=16, num_disk_slots=16, store=StoreMemory())
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            ours = prompt_hashes(4, "a")
            await worker.store(ours, tenant_digest("a"))
            await worker.store(HASHES)
            await settled(manager)
            assert host.disk_memory is not None and len(host.disk_memory.slots) == 10
            assert await worker.ask(Clear(tenant_digest("a"))) == Done(4 + 4 + 4)
            assert (await worker.onboard(ours, tenant_digest("a")))[1].num_blocks == 0
            assert (await worker.onboard(HASHES))[1].num_blocks == 6
            left = b"".join(host.memory.pool[slot].tobytes() for slot in range(16))
            assert not any(content_of(name) in left for name in ours)

    run(scene)


def test_a_batch_is_answered_in_order_and_garbage_is_refused():
    async def scene():
        async with Host().manager() as manager:
            worker = Worker(manager)
            await worker.join()
            raw = await manager.handle(encode_batch([GetStats(), Pin((), 1.0), Renew("x", "y", ())]))
            assert [type(result) for result in decode_results(raw)] == [Stats, Done, Unknown]
            with pytest.raises(ProtocolError, match="operations"):
                await manager.handle(b"garbage")

    run(scene)


def test_after_the_stop_everything_is_refused_and_the_arena_is_given_back():
    async def scene():
        host = Host()
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
        answer = await worker.ask(GetStats())
        assert isinstance(answer, Refused)
        assert "KELP_WORKER_LOST" in answer.message
        assert host.arena is not None and host.arena.closed_kept is False

    run(scene)


def test_the_events_tell_each_tier_of_its_blocks():
    async def scene():
        host = Host(num_disk_slots=8, store=StoreMemory(2))
        host.settings["events.enabled"] = "true"
        host.settings["object_tier.refresh_s"] = "0.001"
        async with host.manager() as manager:
            space_told = []
            worker = Worker(manager)
            await worker.join()
            space = space_of(manager)
            assert space.publisher is not None and space.publisher.endpoint
            for books in (space.host, space.disk):
                assert books is not None
                books._events._sink = space_told.append
            assert space._store is not None
            space._store._names._events._sink = space_told.append
            await worker.store(HASHES[:2])
            await settled(manager)
            await until(lambda: len(space_told) == 3, "all tiers have told")
            told = sorted(space_told, key=lambda event: event.tier)
            assert [(event.tier, event.hashes, event.parent) for event in told] == [
                (Tier.HOST, tuple(HASHES[:2]), None),
                (Tier.DISK, tuple(HASHES[:2]), None),
                (Tier.OBJECT, tuple(HASHES[:2]), None),
            ]
            await worker.release(corrupt=[HASHES[0]])
            assert (space_told[-1].tier, space_told[-1].hashes) == (Tier.HOST, (HASHES[0],))
            assert host.store is not None
            host.store.blocks.clear()
            gone = BlocksRemoved(tuple(HASHES[:2]), Tier.OBJECT)
            await until(lambda: space_told[-1] == gone, "that the store has none")

    run(scene)


def test_leased_values_travel():
    leased = Leased(2, (), (0, 2, 0, 0))
    assert decode_results(encode_batch([leased])) == [leased]
    assert tenant_digest("") == TENANT
