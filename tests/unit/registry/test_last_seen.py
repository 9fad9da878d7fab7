"""What a router starts from while the registry is away."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_directory_registry import record
from test_registry_view import FakeRegistry

from kelp.core.clock import FakeClock
from kelp.core.config_registry import RegistryConfig
from kelp.core.peer_auth import PeerToken
from kelp.core.types import WorkerState
from kelp.registry.access import NOTED_WORKERS, open_memory
from kelp.registry.base import TrafficRecord, WorkerRecord
from kelp.registry.last_seen import LastSeen
from kelp.registry.view import RegistryView

AWAY = OSError("no route to the registry")
TOKEN = PeerToken(b"t" * 32)


def memory(tmp_path: Path, token: PeerToken | None = None) -> LastSeen[WorkerRecord]:
    return open_memory(RegistryConfig(path=tmp_path / "registry"), token).workers


def recalled(tmp_path: Path, token: PeerToken | None = None) -> list[str]:
    return [known.model_name for known in memory(tmp_path, token).recall()]


def folder(tmp_path: Path) -> Path:
    return tmp_path / "registry-last-seen"


def view_of(registry: FakeRegistry, notes: LastSeen[WorkerRecord]) -> RegistryView:
    return RegistryView(registry, refresh_s=0.001, grace_s=60.0, memory=notes)


def names(view: RegistryView) -> list[str]:
    return [known.model_name for known in view.ready()]


def read_and_noted(registry: FakeRegistry, notes: LastSeen[WorkerRecord]) -> None:
    """A router reads the registry once; what it notes has been written when it ends."""

    async def scenario() -> None:
        view = view_of(registry, notes)
        await view.refresh()
        assert view._noting is not None
        await view._noting

    asyncio.run(scenario())


def test_a_router_that_starts_without_a_registry_knows_what_the_one_before_it_knew(tmp_path: Path) -> None:
    registry = FakeRegistry(record("a"), record("b", epoch="e7"))
    read_and_noted(registry, memory(tmp_path))
    registry.error = AWAY
    successor = view_of(registry, memory(tmp_path))
    told: list[list[str]] = []
    successor.on_read = lambda: told.append(names(successor))
    asyncio.run(successor.refresh())
    assert told == [["a", "b"]]
    assert successor.is_alive(record("b").worker_id, "e7")


def test_what_was_noted_counts_for_a_while_after_the_registry_is_back(tmp_path: Path) -> None:
    """Nobody could renew a record meanwhile; and a successor that starts now, too, must know them all."""
    registry = FakeRegistry(record("a"), record("b"))
    read_and_noted(registry, memory(tmp_path))
    registry.error, registry.records = AWAY, [record("b")]

    async def scenario() -> list[str]:
        successor = view_of(registry, memory(tmp_path))
        await successor.refresh()
        registry.error = None
        await successor.refresh()
        if successor._noting is not None:
            await successor._noting
        return names(successor)

    assert asyncio.run(scenario()) == recalled(tmp_path) == ["a", "b"]


def test_whoever_has_read_the_registry_goes_by_that_and_not_by_notes(tmp_path: Path) -> None:
    registry = FakeRegistry(record("new"))

    async def scenario() -> list[str]:
        view = view_of(registry, memory(tmp_path))
        await view.refresh()
        assert view._noting is not None
        await view._noting
        memory(tmp_path).note([record("of another router")])
        registry.error = AWAY
        await view.refresh()
        return names(view)

    assert asyncio.run(scenario()) == ["new"]


def test_a_registry_that_has_lost_its_memory_does_not_wipe_the_notes(tmp_path: Path) -> None:
    read_and_noted(FakeRegistry(record("a")), memory(tmp_path))
    asyncio.run(view_of(FakeRegistry(), memory(tmp_path)).refresh())
    assert recalled(tmp_path) == ["a"]


def test_notes_follow_the_registry(tmp_path: Path) -> None:
    notes = memory(tmp_path)
    for records in ([record("a"), record("b")], [record("b", epoch="e2")], [record("b", epoch="e2"), record("c")]):
        assert notes.is_news(records)
        notes.note(records)
        assert [known.key for known in memory(tmp_path).recall()] == [known.key for known in records]


@pytest.mark.parametrize(
    ("changes", "is_news"),
    [
        ({"heartbeat_ns": 7, "num_running": 3}, False),
        ({"state": WorkerState.DRAINING}, True),
        ({"kv_manager_id": "127.0.0.1:8001/kv_block_manager"}, True),
    ],
)
def test_what_says_nothing_new_is_not_written(tmp_path: Path, changes: dict[str, object], is_news: bool) -> None:
    notes = memory(tmp_path)
    notes.note([record("a")])
    assert notes.is_news([record("a", **changes)]) is is_news


def test_a_workers_load_is_not_remembered(tmp_path: Path) -> None:
    """No heartbeat would ever correct it while the registry is away: a worker that was full would stay so."""
    memory(tmp_path).note([record("a", num_running=200, num_waiting=9)])
    (known,) = memory(tmp_path).recall()
    assert (known.num_running, known.num_waiting) == (0, 0)


def test_shares_of_versions_are_noted_beside_the_workers(tmp_path: Path) -> None:
    config = RegistryConfig(path=tmp_path / "registry")
    kept = open_memory(config, None)
    kept.workers.note([record("a")])
    for shares in ({"base": 1.0}, {"base": 0.0, "v2": 1.0}):
        kept.traffic.note([TrafficRecord(shares=shares)])
        (known,) = open_memory(config, None).traffic.recall()
        assert known.shares == shares
    assert recalled(tmp_path) == ["a"]


def test_registries_that_share_a_folder_do_not_share_notes(tmp_path: Path) -> None:
    def of(url: str) -> LastSeen[WorkerRecord]:
        return open_memory(RegistryConfig(url=url, last_seen_path=tmp_path / "kept"), None).workers

    of("etcd://one:2379/kelp").note([record("a")])
    of("etcd://one:2379/other").note([record("b")])
    assert [known.model_name for known in of("etcd://one:2379/kelp").recall()] == ["a"]


def test_notes_of_whoever_knows_no_token_do_not_count(tmp_path: Path) -> None:
    memory(tmp_path).note([record("a")])
    assert recalled(tmp_path, TOKEN) == []
    memory(tmp_path, TOKEN).note([record("a")])
    assert recalled(tmp_path, TOKEN) == ["a"]
    assert recalled(tmp_path, PeerToken(b"u" * 32)) == []


@pytest.mark.parametrize("token", [None, TOKEN], ids=["no token", "token"])
def test_notes_that_are_cut_or_changed_do_not_count(tmp_path: Path, token: PeerToken | None) -> None:
    memory(tmp_path, token).note([record("a"), record("b")])
    (path,) = folder(tmp_path).iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], whole.replace(b"8001", b"6666"), b"\xff\n" + whole):
        path.write_bytes(damaged)
        assert recalled(tmp_path, token) == []
    path.write_bytes(whole)
    assert recalled(tmp_path, token) == ["a", "b"]


def test_notes_that_others_could_have_written_do_not_count(tmp_path: Path) -> None:
    memory(tmp_path).note([record("a")])
    (path,) = folder(tmp_path).iterdir()
    for place in (path, folder(tmp_path)):
        mode = place.stat().st_mode
        place.chmod(mode | 0o022)
        assert recalled(tmp_path) == []
        place.chmod(mode)
    assert recalled(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_written_is_said_once_and_tried_again_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, records = FakeClock(), [record("a")]
    folder(tmp_path).write_text("a file, not a folder")
    notes = LastSeen(folder(tmp_path), "here", NOTED_WORKERS, None, clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            notes.note(records)
            assert not notes.is_news(records)
            clock.advance(31.0)
            assert notes.is_news(records)
    assert len([entry for entry in caplog.records if "not noted" in entry.message]) == 1
    folder(tmp_path).unlink()
    notes.note(records)
    assert len(notes.recall()) == 1


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    memory(tmp_path).note([record("a")])
    old, young = folder(tmp_path) / ".new-old", folder(tmp_path) / ".new-young"
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (1e9, 1e9))
    memory(tmp_path).note([record("b")])
    assert (old.exists(), young.exists()) == (False, True)


def test_a_disk_that_hangs_does_not_keep_the_registrys_news_away(tmp_path: Path) -> None:
    hangs = threading.Event()

    class Stuck(LastSeen[WorkerRecord]):
        def note(self, records: Sequence[WorkerRecord]) -> None:
            hangs.wait(30.0)

    registry = FakeRegistry(record("a"))

    async def scenario() -> list[str]:
        view = view_of(registry, Stuck(tmp_path, "here", NOTED_WORKERS, None, FakeClock()))
        await asyncio.wait_for(view.refresh(), 10.0)
        registry.records = [record("b")]
        await asyncio.wait_for(view.refresh(), 10.0)
        hangs.set()
        return names(view)

    assert asyncio.run(scenario()) == ["b"]


def test_nothing_is_known_where_nothing_was_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = FakeRegistry()
    registry.error = AWAY
    view = view_of(registry, memory(tmp_path))
    asyncio.run(view.refresh())
    assert names(view) == []
    assert not [entry for entry in caplog.records if "of no use" in entry.message]
