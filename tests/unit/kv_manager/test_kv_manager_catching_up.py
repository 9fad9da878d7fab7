"""What lower tiers could not take when it was offered gets there later, at nobody's cost."""

from __future__ import annotations

import asyncio
import threading

import pytest
from fake_tiers import FakeObjects, StoreMemory
from manager_rig import TENANT, Host, Worker, content_of, prompt_hashes, settled, space_of

from kelp.core.clock import FakeClock
from kelp.core.hashing import tenant_digest
from kelp.core.kv_manager_messages import Clear, Done
from kelp.kv.manager import catching_up, lower
from kelp.kv.manager.states import SlotState
from support.waiting import until

HASHES = prompt_hashes(6)
OTHERS = prompt_hashes(6, first_token=500)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catching_up, "POLL_S", 0.001)
    monkeypatch.setattr(catching_up, "PAUSE_S", 0.001)
    monkeypatch.setattr(lower, "_POLL_S", 0.001)


def run(scene) -> None:
    asyncio.run(scene())


def names_in(store: StoreMemory) -> set[bytes]:
    return {name for _, name in store.blocks}


def all_right(store: StoreMemory) -> bool:
    return all(content == content_of(name) for (_, name), (content, _) in store.blocks.items())


async def _store_while_away(host: Host, is_kept: bool) -> None:
    """Store a prompt while there is no store, and end: killed if `is_kept`."""
    assert host.store is not None
    host.store.is_available = False
    async with host.manager(is_kept=is_kept) as manager:
        worker = Worker(manager)
        await worker.join()
        await worker.store(HASHES)
        await settled(manager)
        assert host.store.blocks == {}


async def _nothing_is_held(manager) -> None:
    slots = space_of(manager).host.shelf.slots
    await until(lambda: not slots.num_references and not slots.count(SlotState.FILLING), "nothing held or borrowed")
    space_of(manager).host.shelf.check_integrity()


def test_groups_that_were_refused_while_the_store_was_away_are_written_once_it_is_back():
    async def scene():
        store = StoreMemory(2, is_available=False)
        async with Host(store=store).manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
            assert store.blocks == {}
            store.is_available = True
            await until(lambda: names_in(store) == set(HASHES), "all groups in the store")
            assert all_right(store)
            await _nothing_is_held(manager)

    run(scene)


def test_groups_that_failed_are_written_again():
    async def scene():
        store = StoreMemory(2, num_failing_puts=4)
        async with Host(store=store).manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await until(lambda: names_in(store) == set(HASHES), "all groups in the store")
            await _nothing_is_held(manager)

    run(scene)


def test_a_killed_manager_s_host_tier_is_written_by_the_next_one():
    async def scene():
        host = Host(store=StoreMemory(2))
        await _store_while_away(host, is_kept=True)
        async with host.manager() as manager:
            await Worker(manager, epoch="e2").join()
            assert host.store is not None
            store = host.store
            await until(lambda: space_of(manager).host.num_unverified == 0, "all looked at")
            assert store.blocks == {}
            store.is_available = True
            await until(lambda: names_in(store) == set(HASHES), "all groups in the store")

    run(scene)


def test_blocks_that_lie_on_disk_alone_are_written_through_borrowed_slots():
    async def scene():
        host = Host(num_slots=8, num_disk_slots=16, store=StoreMemory(2))
        await _store_while_away(host, is_kept=False)
        assert host.store is not None
        host.store.is_available = True
        async with host.manager() as manager:
            worker = Worker(manager, epoch="e2")
            await worker.join()
            store = host.store
            await until(lambda: names_in(store) == set(HASHES), "all groups in the store")
            assert all_right(store)
            await _nothing_is_held(manager)
            assert len(space_of(manager).host.shelf) == 0, "nothing was promoted for it"

    run(scene)


def test_a_group_of_which_one_half_lies_on_disk_is_written():
    async def scene():
        store = StoreMemory(2, is_available=False)
        host = Host(num_slots=8, num_disk_slots=16, store=store)
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
            shelf = space_of(manager).host.shelf
            for name in (HASHES[0], HASHES[3]):
                shelf.remove(name, "evicted")
            store.is_available = True
            await until(lambda: names_in(store) == set(HASHES), "all groups in the store")
            assert all_right(store)
            await _nothing_is_held(manager)

    run(scene)


def test_damage_on_disk_does_not_get_into_the_store():
    async def scene():
        host = Host(num_disk_slots=16, store=StoreMemory(2))
        await _store_while_away(host, is_kept=False)
        assert host.disk is not None and host.store is not None
        host.disk.damage(HASHES[2])
        host.store.is_available = True
        async with host.manager() as manager:
            await Worker(manager, epoch="e2").join()
            store, wanted = host.store, {*HASHES[:2], *HASHES[4:]}
            await until(lambda: names_in(store) == wanted, "the sound groups in the store")
            await until(lambda: HASHES[2] not in space_of(manager).disk.shelf, "the damaged block is gone")
            assert HASHES[3] not in names_in(store)
            await _nothing_is_held(manager)

    run(scene)


def test_what_another_host_has_put_there_meanwhile_is_not_written_again(monkeypatch: pytest.MonkeyPatch):
    put: list[bytes] = []
    plain_put = FakeObjects.put

    def counted(self: FakeObjects, slots, records) -> bool:
        put.extend(record.sequence_hash for record in records)
        return plain_put(self, slots, records)

    async def scene():
        host = Host(num_disk_slots=16, store=StoreMemory(2))
        await _store_while_away(host, is_kept=False)
        assert host.store is not None
        host.store.is_available = True
        async with Host(store=host.store).manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES[:4])
            await settled(manager)
        monkeypatch.setattr(FakeObjects, "put", counted)
        async with host.manager() as manager:
            await Worker(manager, epoch="e2").join()
            store = host.store
            await until(lambda: names_in(store) == set(HASHES), "all groups in the store")
            assert set(put) == set(HASHES[4:])

    run(scene)


def test_a_full_store_is_left_as_it_is():
    async def scene():
        host = Host(store=StoreMemory(2), settings={"object_tier.max_bytes": "1000", "object_tier.refresh_s": "0.001"})
        await _store_while_away(host, is_kept=True)
        async with host.manager() as manager:
            await Worker(manager, epoch="e2").join()
            store, objects = host.store, host.objects
            assert store is not None and objects is not None
            await until(lambda: space_of(manager).host.num_unverified == 0, "all offered in vain")
            objects.stored_bytes = 900
            store.is_available = True
            num_refreshed = objects.num_refreshes
            await until(lambda: objects.num_refreshes > num_refreshed + 3, "the store is looked at")
            assert store.blocks == {}, "128 bytes more would be too much"
            objects.stored_bytes = 0
            await until(lambda: names_in(store) == set(HASHES), "all groups in the store")

    run(scene)


def test_a_tenant_whose_share_of_the_store_is_full_is_not_offered_again():
    async def scene():
        store = StoreMemory(2, is_available=False)
        host = Host(num_slots=16, store=store)
        async with host.manager() as manager:
            worker, theirs = Worker(manager), prompt_hashes(4, "b")
            await worker.join()
            await worker.store(HASHES)
            await worker.store(theirs, tenant_digest("b"))
            await settled(manager)
            assert host.objects is not None
            host.objects.full_tenants = frozenset({TENANT})
            store.is_available = True
            await until(lambda: names_in(store) == set(theirs), "the other tenant's groups, which lie behind")

    run(scene)


def test_what_is_cleared_while_it_is_read_for_the_store_does_not_get_there():
    async def scene():
        host = Host(num_disk_slots=16, store=StoreMemory(2))
        await _store_while_away(host, is_kept=False)
        assert host.store is not None
        async with host.manager() as manager:
            worker = Worker(manager, epoch="e2")
            await worker.join()
            space, store = space_of(manager), host.store
            assert space.disk is not None
            disk = space.disk
            await until(lambda: len(disk.shelf) == 6, "the disk has been read")
            gate = threading.Event()
            stuck = disk.thread.start(gate.wait)
            store.is_available = True
            await until(lambda: space.host.shelf.slots.count(SlotState.FILLING) > 0, "slots are borrowed")
            clearing = asyncio.ensure_future(worker.ask(Clear(TENANT)))
            await until(lambda: len(disk.shelf) == 0 or clearing.done(), "it is cleared")
            gate.set()
            await stuck
            assert await clearing == Done(6)
            await _nothing_is_held(manager)
            assert store.blocks == {}

    run(scene)


def test_blocks_that_the_disk_refused_are_written_again():
    async def scene():
        host = Host(num_disk_slots=16)
        assert host.disk_memory is not None
        host.disk_memory.num_failing_writes = 1
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            disk = space_of(manager).disk
            assert disk is not None
            await until(lambda: set(disk.shelf.names()) == set(HASHES), "all on disk at the second attempt")
            await settled(manager)
            await _nothing_is_held(manager)

    run(scene)


def test_nothing_leaves_the_disk_for_what_was_missed():
    async def scene():
        async with Host(num_disk_slots=2).manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
            space = space_of(manager)
            assert space.disk is not None and space.disk_writes is not None
            missing = next(name for name in HASHES if name not in space.disk.shelf)
            space.disk_writes.offer_again(missing)
            assert space.disk_writes.num_waiting == 0
            space.disk.shelf.remove(next(iter(space.disk.shelf.names())), "corrupt")
            space.disk_writes.offer_again(missing)
            await until(lambda: missing in space.disk.shelf, "it takes the free place")

    run(scene)


def test_what_was_never_offered_often_enough_is_not_written_for_having_been_missed():
    async def scene():
        host = Host(num_slots=16, num_disk_slots=32, settings={"disk_tier.min_offers": "2"})
        assert host.disk_memory is not None
        host.disk_memory.num_failing_writes = 1
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await worker.onboard(HASHES[:2])
            disk = space_of(manager).disk
            assert disk is not None
            await until(lambda: len(disk.shelf) == 2, "those offered twice, at the second attempt")
            await settled(manager)
            assert set(disk.shelf.names()) == set(HASHES[:2])

    run(scene)


def test_blocks_beyond_the_write_budget_wait_for_it():
    async def scene():
        clock = FakeClock()
        host = Host(num_disk_slots=32, clock=clock, settings={"disk_tier.max_write_bytes_per_s": "128"})
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            disk = space_of(manager).disk
            assert disk is not None
            for num_written in (2, 4, 6):
                await until(lambda wanted=num_written: len(disk.shelf) == wanted, "a second's worth on disk")
                clock.advance(1.0)
            await settled(manager)

    run(scene)
