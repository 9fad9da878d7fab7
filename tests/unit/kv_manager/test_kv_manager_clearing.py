"""A clear ends, whatever happens on the way: the store is away, the manager is killed, the disk is not read yet."""

from __future__ import annotations

import asyncio
import copy
import shutil
import threading
from pathlib import Path

import pytest
from fake_tiers import FakeDisk, StoreMemory
from manager_rig import BLOCK_BYTES, SPACE, Host, Worker, content_of, prompt_hashes, settled, space_of

from kelp.build.kv_manager import build_kv_manager
from kelp.core.config import load_config
from kelp.core.hashing import tenant_digest
from kelp.core.kv_manager_messages import Clear, Done, GetStats, Refused, Stats
from kelp.core.metrics import Metrics
from kelp.core.types import Tier
from kelp.kv.manager import clearing, lower
from kelp.kv.manager.clearing import Clearing
from kelp.kv.tiers.clears import LOWER_TIERS, ClearJournal, OwedClear
from support.waiting import until

OURS = prompt_hashes(4, "a")
TENANT = tenant_digest("a")
THEIRS = prompt_hashes(6)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "_POLL_S", 0.001)
    monkeypatch.setattr(clearing, "WIPE_AGAIN_S", 0.02)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "clears"


def run(scene) -> None:
    asyncio.run(scene())


def make_host(journal: Path) -> Host:
    settings = {"object_tier.refresh_s": "0.001"}
    return Host(num_slots=16, num_disk_slots=16, store=StoreMemory(2), settings=settings, journal=journal)


async def _filled(manager) -> Worker:
    worker = Worker(manager)
    await worker.join()
    await worker.store(OURS, TENANT)
    await worker.store(THEIRS)
    await settled(manager)
    return worker


def what_outlives(host: Host) -> Host:
    """What a manager finds that starts after this one is killed now; the store is shared."""
    assert host.journal is not None
    found = Host(
        host.num_slots, host.num_disk_slots, host.store, host.settings, journal=host.journal.with_name("clears-kept")
    )
    if host.journal.exists():
        shutil.copy(host.journal, found.journal)
    found.memory, found.disk_memory = copy.deepcopy(host.memory), copy.deepcopy(host.disk_memory)
    return found


def places(host: Host) -> bytes:
    """All bytes of all tiers."""
    assert host.disk_memory is not None and host.store is not None
    on_disk = [content for content, _ in host.disk_memory.slots.values()]
    in_store = [content for content, _ in host.store.blocks.values()]
    return b"".join([host.memory.pool.tobytes(), *on_disk, *in_store])


def is_left(host: Host) -> bool:
    return any(content_of(name) in places(host) for name in OURS)


async def _cleared_by_the_next(host: Host) -> None:
    """The next manager finishes the clear, gives nobody a block of it meanwhile, and leaves the others alone."""
    assert is_left(host)
    async with host.manager() as manager:
        worker = Worker(manager, epoch="e2")
        await worker.join()
        if host.store is not None and host.store.is_available:
            await until(lambda: not any(tenant == TENANT for tenant, _ in host.store.blocks), "gone from the store")
        assert (await worker.onboard(OURS, TENANT))[1].num_blocks == 0
        assert (await worker.onboard(THEIRS))[1].num_blocks == 6
        await until(lambda: not host.journal.exists(), "the clear is finished")
        assert not is_left(host)
        values = (await worker.ask(GetStats())).values
        assert values['kelp_kv_manager_held{kind="clears"}'] == 0


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_a_clear_that_a_kill_interrupts_is_finished_by_the_next_manager(journal: Path, tier: Tier):
    async def scene():
        host, gate = make_host(journal), threading.Event()
        async with host.manager() as manager:
            worker = await _filled(manager)
            space = space_of(manager)
            thread = space.host.thread if tier is Tier.HOST else space.disk.thread
            stuck = thread.start(gate.wait)
            clearing = asyncio.ensure_future(worker.ask(Clear(TENANT)))
            await until(lambda: thread.num_waiting > 1, "it has come to this tier")
            killed = what_outlives(host)
            killed.store = copy.deepcopy(host.store)
            gate.set()
            await stuck
            assert await clearing == Done(12)
        await _cleared_by_the_next(killed)

    run(scene)


def test_what_an_earlier_manager_was_to_clear_is_never_found_again(journal: Path, monkeypatch: pytest.MonkeyPatch):
    """Even with all that finishes a clear held back, nobody is given its blocks by the next manager."""

    async def scene():
        host = make_host(journal)
        async with host.manager(is_kept=True) as manager:
            await _filled(manager)
        host.store = None
        ClearJournal(journal).save([OwedClear(TENANT, LOWER_TIERS)])
        monkeypatch.setattr(Clearing, "finish", lambda _: asyncio.sleep(0))
        async with host.manager() as manager:
            worker = Worker(manager, epoch="e2")
            await worker.join()
            space = space_of(manager)
            await until(lambda: len(space.disk.shelf) == 6, "the disk has been read")
            assert (await worker.onboard(OURS, TENANT))[1].num_blocks == 0
            assert (await worker.onboard(THEIRS))[1].num_blocks == 6
            assert journal.exists()

    run(scene)


def test_a_clear_that_waits_for_the_store_is_finished_by_the_next_manager(journal: Path):
    async def scene():
        host = make_host(journal)
        async with host.manager() as manager:
            worker = await _filled(manager)
            host.store.is_available = False
            answer = await worker.ask(Clear(TENANT))
            assert isinstance(answer, Refused)
            assert "8 blocks are gone, but what the store has is left" in answer.message
            killed = what_outlives(host)
        killed.store.is_available = True
        await _cleared_by_the_next(killed)

    run(scene)


def test_a_clear_waits_for_the_store_as_long_as_it_takes(journal: Path):
    async def scene():
        host = make_host(journal)
        async with host.manager() as manager:
            worker = await _filled(manager)
            host.store.is_available = False
            for _ in range(2):
                assert isinstance(await worker.ask(Clear(TENANT)), Refused)
            values = await worker.ask(GetStats())
            assert isinstance(values, Stats)
            assert values.values['kelp_kv_manager_held{kind="clears"}'] == 1, "asking twice owes it once"
            host.store.is_available = True
            await until(lambda: not journal.exists(), "the clear is finished")
            assert not is_left(host)
            assert {name for _, name in host.store.blocks} == set(THEIRS)

    run(scene)


def test_a_clear_waits_until_the_disk_has_been_read(journal: Path, monkeypatch: pytest.MonkeyPatch):
    gate = threading.Event()
    plain = FakeDisk.recovered

    def slow(self: FakeDisk):
        gate.wait()
        return plain(self)

    async def scene():
        host = make_host(journal)
        async with host.manager() as manager:
            await _filled(manager)
        monkeypatch.setattr(FakeDisk, "recovered", slow)
        async with host.manager() as manager:
            worker = Worker(manager, epoch="e2")
            await worker.join()
            clearing = asyncio.ensure_future(worker.ask(Clear(TENANT)))
            await until(journal.exists, "it is written down")
            gate.set()
            assert await clearing == Done(4 + 4), "of the disk and of the store"
            assert not is_left(host)

    run(scene)


def test_a_clear_that_the_store_owes_outlives_a_time_without_the_store(journal: Path):
    async def scene():
        host = make_host(journal)
        async with host.manager() as manager:
            worker = await _filled(manager)
            host.store.is_available = False
            assert isinstance(await worker.ask(Clear(TENANT)), Refused)
        store, host.store = host.store, None
        async with host.manager() as manager:
            worker = Worker(manager, epoch="e2")
            await worker.join()
            await until(lambda: len(space_of(manager).clearing) == 0, "nothing is left to be done here")
        store.is_available = True
        host.store = store
        async with host.manager() as manager:
            await Worker(manager, epoch="e3").join()
            await until(lambda: not journal.exists(), "the clear is finished")
            assert {name for _, name in store.blocks} == set(THEIRS)

    run(scene)


def test_a_clear_whose_bytes_the_disk_did_not_wipe_is_not_finished(journal: Path):
    async def scene():
        host = make_host(journal)
        host.settings["kv_manager.lease_ttl_s"] = "0.04"
        async with host.manager() as manager:
            worker = await _filled(manager)
            host.disk.owes_wipes = True
            answer = await worker.ask(Clear(TENANT, (Tier.DISK,)))
            assert isinstance(answer, Refused)
            assert "4 blocks are gone, but bytes are left on disk" in answer.message
            assert f"{TENANT.hex()} disk" in journal.read_text()
            disk, plain_clear = host.disk, host.disk.clear

            def clear(slots, is_wiped=False):
                disk.owes_wipes = not is_wiped
                plain_clear(slots, is_wiped)

            disk.clear = clear
            await until(lambda: not journal.exists(), "the disk has been asked again, and the clear is finished")

    run(scene)


def test_one_tier_can_be_cleared_alone(journal: Path):
    async def scene():
        host = make_host(journal)
        async with host.manager() as manager:
            worker = await _filled(manager)
            assert await worker.ask(Clear(TENANT, (Tier.HOST,))) == Done(4)
            assert (await worker.onboard(OURS, TENANT))[1].tiers == (0, 0, 4, 0)
            assert await worker.ask(Clear(None, (Tier.DISK, Tier.OBJECT))) == Done(10 + 10)
            assert not journal.exists()

    run(scene)


def test_a_clear_that_cannot_be_written_down_is_done_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def scene():
        host = make_host(tmp_path / "gone" / "clears")
        async with host.manager() as manager:
            worker = await _filled(manager)
            assert await worker.ask(Clear(TENANT)) == Done(12)
            assert not is_left(host)
        assert "would not outlive this process" in caplog.text

    run(scene)


@pytest.mark.parametrize("has_disk", [True, False])
def test_what_is_owed_lies_where_it_outlives_what_it_is_about(tmp_path: Path, has_disk: bool):
    """With the slot files, which a restart of the host spares; else beside the arena, whose end it survives."""
    settings = {"kv_manager.arena_folder": str(tmp_path / "arena"), "kv_manager.host_bytes": str(2**20)}
    if has_disk:
        settings |= {"disk_tier.path": str(tmp_path / "disk"), "disk_tier.max_bytes": str(2**20)}
    manager = build_kv_manager(load_config(settings), "manager", Metrics())
    tiers = manager._parts.open_tiers(SPACE, BLOCK_BYTES)
    assert tiers.journal is not None
    tiers.journal.save([OwedClear(TENANT, LOWER_TIERS)])
    tiers.close(is_kept=False)
    (found,) = tmp_path.glob("disk/*/clears" if has_disk else "arena/clears-arena-0")
    assert TENANT.hex() in found.read_text()
    again = manager._parts.open_tiers(SPACE, BLOCK_BYTES)
    assert again.journal is not None and again.journal.load() == [OwedClear(TENANT, LOWER_TIERS)]
    again.close(is_kept=False)
