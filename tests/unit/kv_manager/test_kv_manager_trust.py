"""What is damaged or gone is told apart and never leased, whoever looks first."""

from __future__ import annotations

import asyncio
import dataclasses

import msgspec
import pytest
from fake_tiers import StoreMemory
from manager_rig import Host, Worker, content_of, prompt_hashes, settled, space_of

from kelp.core.kv_manager_messages import GetStats, Joined, Stats
from kelp.kv.manager.host import HostTier

HASHES = prompt_hashes(6)


def run(scene) -> None:
    asyncio.run(scene())


async def stats(worker: Worker) -> dict[str, float]:
    answer = await worker.ask(GetStats())
    assert isinstance(answer, Stats)
    return answer.values


async def _left_behind(host: Host) -> None:
    """Store everything, and die."""
    async with host.manager(is_kept=True) as manager:
        worker = Worker(manager)
        await worker.join()
        await worker.store(HASHES)


def _stop_background_check(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_: HostTier) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(HostTier, "verify_some", never)


def test_recovered_blocks_are_checked_before_they_are_leased(monkeypatch: pytest.MonkeyPatch):
    """With the background check held back, only the one before leasing can find the damage, or vouch for the rest."""
    _stop_background_check(monkeypatch)

    async def scene():
        host = Host()
        await _left_behind(host)
        (damaged,) = [slot for slot, record in host.memory.records.items() if record.sequence_hash == HASHES[3]]
        host.memory.pool[damaged][0] ^= 1
        async with host.manager() as manager:
            worker = Worker(manager, epoch="e2")
            await worker.join()
            assert space_of(manager).host.num_unverified == 6
            _, leased = await worker.onboard(HASHES)
            assert leased.num_blocks == 3
            assert worker.read(leased) == [content_of(name) for name in HASHES[:3]]
            assert space_of(manager).host.num_unverified == 0
            assert (await stats(worker))['kelp_kv_tier_corrupt_blocks_total{tier="host"}'] == 1

    run(scene)


def test_the_manager_takes_the_checksum_of_what_has_arrived_also_from_a_pool_on_a_gpu():
    async def scene():
        host = Host()
        async with host.manager() as manager:
            worker = Worker(manager)
            join = worker.join_operation()
            worker._agent._region = dataclasses.replace(worker._agent.region, device="cuda:0")
            pool = msgspec.structs.replace(join.pool, device="cuda:0")
            assert isinstance(await worker.ask(msgspec.structs.replace(join, pool=pool)), Joined)
            await worker.store(HASHES)
            assert len(host.memory.records) == 6
            for slot, record in host.memory.records.items():
                assert record.checksum == host.arena.checksum(slot, record.sequence_hash)

    run(scene)


def test_blocks_that_nobody_asked_for_stay_unverified_without_the_background_check(monkeypatch: pytest.MonkeyPatch):
    _stop_background_check(monkeypatch)

    async def scene():
        host = Host()
        await _left_behind(host)
        async with host.manager() as manager:
            worker = Worker(manager, epoch="e2")
            await worker.join()
            _, leased = await worker.onboard(HASHES[:2])
            assert leased.num_blocks == 2
            assert space_of(manager).host.num_unverified == 4

    run(scene)


async def _stored(host: Host) -> None:
    async with host.manager() as manager:
        worker = Worker(manager)
        await worker.join()
        await worker.store(HASHES)
        await settled(manager)


def test_damaged_objects_are_corrupt_and_objects_that_are_gone_are_not():
    async def scene():
        store = StoreMemory(2)
        await _stored(Host(store=store))
        other = Host(store=store)
        async with other.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            assert other.objects is not None
            other.objects.damage(HASHES[3])
            _, leased = await worker.onboard(HASHES)
            assert leased.num_blocks == 3
            found = await stats(worker)
            assert found['kelp_kv_tier_corrupt_blocks_total{tier="object"}'] == 1
            assert found['kelp_kv_tier_events_total{kind="damaged",tier="object"}'] == 1

    run(scene)


def test_the_store_s_state_and_the_disk_s_events_are_shown():
    async def scene():
        store = StoreMemory(2)
        host = Host(num_slots=6, num_disk_slots=32, store=store)
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            assert (await stats(worker))['kelp_kv_object_store{state="closed"}'] == 1
            store.is_available = False
            assert (await stats(worker))['kelp_kv_object_store{state="closed"}'] == 0
            assert (await stats(worker))['kelp_kv_object_store{state="open"}'] == 1
            assert host.disk is not None
            host.disk.events["corrupt"] = 3
            for _ in range(2):
                assert (await stats(worker))['kelp_kv_tier_events_total{kind="corrupt",tier="disk"}'] == 3

    run(scene)
