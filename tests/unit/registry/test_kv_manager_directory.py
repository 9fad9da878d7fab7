"""KV block managers in the registry's folder."""

from __future__ import annotations

from pathlib import Path

from kelp.core.clock import FakeClock
from kelp.registry.base import KvManagerRecord
from kelp.registry.directory import DirectoryRegistry, KvManagerDirectory, RouterDirectory

RECORD = KvManagerRecord(
    manager_id="127.0.0.1:8001/kv_block_manager",
    epoch="e1",
    host="here",
    endpoint="127.0.0.1:8001",
    model_name="kv_block_manager",
)


def test_a_manager_is_seen_until_it_withdraws_and_by_nobody_who_looks_for_others(tmp_path: Path) -> None:
    directory = KvManagerDirectory(tmp_path, 5.0)
    directory.publish(RECORD)
    (found,) = directory.snapshot()
    assert found.model_copy(update={"heartbeat_ns": 0}) == RECORD
    assert DirectoryRegistry(tmp_path, 5.0).snapshot() == []
    assert RouterDirectory(tmp_path, 5.0).snapshot() == []
    directory.withdraw(RECORD.manager_id, "another epoch")
    assert len(directory.snapshot()) == 1
    directory.withdraw(RECORD.manager_id, RECORD.epoch)
    assert directory.snapshot() == []


def test_a_dead_manager_is_swept(tmp_path: Path) -> None:
    clock = FakeClock()
    directory = KvManagerDirectory(tmp_path, 5.0, clock)
    directory.publish(RECORD)
    clock.advance(5.1)
    assert directory.snapshot() == []
    assert directory.sweep() == 1
    assert list(tmp_path.iterdir()) == []
