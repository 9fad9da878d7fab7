"""The directory registry: heartbeats, incarnations, garbage."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from kelp.core.clock import FakeClock
from kelp.core.types import Role, WorkerState
from kelp.registry.base import LayoutRecord, RouterRecord, WorkerRecord
from kelp.registry.directory import DirectoryRegistry

EXPIRY_S = 5.0
LAYOUT = LayoutRecord(
    num_blocks=64, num_layers=1, num_kv_heads=1, block_size=4, head_dim=2, dtype="float32", model_id="m"
)


def record(name: str = "decode", epoch: str = "e1", **changes: object) -> WorkerRecord:
    fields: dict[str, object] = {
        "worker_id": f"127.0.0.1:8001/{name}",
        "epoch": epoch,
        "model_name": name,
        "role": Role.DECODE,
        "state": WorkerState.READY,
        "endpoint": "127.0.0.1:8001",
        "layout": LAYOUT,
    }
    return WorkerRecord.model_validate({**fields, **changes})


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def registry(tmp_path: Path, clock: FakeClock) -> DirectoryRegistry:
    return DirectoryRegistry(tmp_path / "registry", EXPIRY_S, clock)


def names(registry: DirectoryRegistry) -> list[str]:
    return [found.model_name for found in registry.snapshot()]


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "registry").iterdir())


def test_a_published_record_is_found_with_its_heartbeat(registry: DirectoryRegistry, clock: FakeClock) -> None:
    registry.publish(record())
    assert registry.snapshot() == [record(heartbeat_ns=clock.wall_ns())]


def test_two_processes_see_the_same_registry(tmp_path: Path, clock: FakeClock) -> None:
    DirectoryRegistry(tmp_path, EXPIRY_S, clock).publish(record())
    assert names(DirectoryRegistry(tmp_path, EXPIRY_S, clock)) == ["decode"]


def test_a_folder_that_does_not_exist_is_an_empty_registry(registry: DirectoryRegistry) -> None:
    assert registry.snapshot() == []
    assert registry.sweep() == 0
    registry.withdraw("127.0.0.1:8001/decode", "e1")


def test_only_this_user_may_look_into_the_folder(registry: DirectoryRegistry, tmp_path: Path) -> None:
    registry.publish(record())
    assert (tmp_path / "registry").stat().st_mode & 0o777 == 0o700


def test_a_renewed_record_replaces_the_former_one(registry: DirectoryRegistry, tmp_path: Path) -> None:
    registry.publish(record(num_running=1))
    registry.publish(record(num_running=2))
    assert [found.num_running for found in registry.snapshot()] == [2]
    assert len(files(tmp_path)) == 1, "a temporary file was left"


def test_a_record_lives_as_long_as_its_heartbeat(registry: DirectoryRegistry, clock: FakeClock) -> None:
    registry.publish(record("old"))
    clock.advance(EXPIRY_S - 1)
    registry.publish(record("new"))
    assert names(registry) == ["new", "old"]
    clock.advance(1.5)
    assert names(registry) == ["new"]
    registry.publish(record("old"))
    assert names(registry) == ["new", "old"]


def test_workers_of_one_name_on_two_servers_are_two(registry: DirectoryRegistry) -> None:
    registry.publish(record())
    registry.publish(record(worker_id="127.0.0.1:9001/decode", endpoint="127.0.0.1:9001"))
    assert len(registry.snapshot()) == 2


def test_a_withdrawn_record_is_gone(registry: DirectoryRegistry) -> None:
    registry.publish(record())
    registry.withdraw(record().worker_id, "e1")
    registry.withdraw(record().worker_id, "e1")
    assert registry.snapshot() == []


def test_a_late_withdrawal_does_not_hit_the_next_incarnation(registry: DirectoryRegistry) -> None:
    registry.publish(record(epoch="e1"))
    registry.publish(record(epoch="e2"))
    registry.withdraw(record().worker_id, "e1")
    assert [found.epoch for found in registry.snapshot()] == ["e2"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff\xfe\x00",
        b"not json",
        b"[]",
        b"{}",
        json.dumps({**json.loads(record().model_dump_json()), "surprise": 1}).encode(),
        json.dumps({**json.loads(record().model_dump_json()), "heartbeat_ns": -1}).encode(),
        json.dumps({**json.loads(record().model_dump_json()), "role": "emperor"}).encode(),
        json.dumps({**json.loads(record().model_dump_json()), "events_endpoint": "host"}).encode(),
        b'{"worker_id": "' + b"x" * 5_000_000 + b'"}',
    ],
    ids=[
        "empty",
        "binary",
        "text",
        "list",
        "no fields",
        "unknown field",
        "negative",
        "unknown role",
        "no port",
        "huge",
    ],
)
def test_a_file_that_is_no_record_hides_no_worker(
    registry: DirectoryRegistry, tmp_path: Path, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    registry.publish(record())
    (tmp_path / "registry" / "garbage.worker.json").write_bytes(garbage)
    with caplog.at_level(logging.WARNING):
        assert names(registry) == ["decode"]
        assert names(registry) == ["decode"]
    assert caplog.text.count("garbage.worker.json") == 1, "said once, not at every look"
    assert len(caplog.text) < 2000


def test_a_file_that_becomes_another_kind_of_garbage_is_told_of_again(
    registry: DirectoryRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry.publish(record())
    for content in (b"not json", b"[]", record().model_dump_json().encode(), b"[]"):
        (tmp_path / "registry" / "garbage.worker.json").write_bytes(content)
        registry.snapshot()
    assert caplog.text.count("garbage.worker.json") == 3


def test_a_record_that_cannot_be_read_hides_no_worker(
    registry: DirectoryRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry.publish(record())
    (tmp_path / "registry" / "folder.worker.json").mkdir()
    for _ in range(2):
        assert names(registry) == ["decode"]
    assert caplog.text.count("folder.worker.json") == 1


ENDPOINTS = ("endpoint", "direct_endpoint", "handoff_endpoint", "events_endpoint", "replay_endpoint")
BAD_ENDPOINTS = (
    *("host", "host:", ":1", "host:0", "host:65536", "host:123456", "host:-1", "host:1 ", "ho st:1", "host:1/x"),
    *("tcp://host:1", "user@host:1", "::1:80", "[::1]", "[::1]:", "[host]:1", "host:1\n", "host:\u0661", "\0:1"),
)


@pytest.mark.parametrize("value", BAD_ENDPOINTS)
def test_an_endpoint_is_a_host_and_a_port(value: str) -> None:
    for field in ENDPOINTS:
        with pytest.raises(ValidationError, match="is not host:port"):
            record(**{field: value})
    for field in ("loads_endpoint", "answers_endpoint"):
        fields = {"router_id": "r", "epoch": 1, "loads_endpoint": "host:1", "answers_endpoint": "host:2", field: value}
        with pytest.raises(ValidationError, match="is not host:port"):
            RouterRecord.model_validate(fields)


@pytest.mark.parametrize("value", ["host:1", "a.b-c_d:65535", "127.0.0.1:80", "[::1]:80", "[fe80::1%eth0]:80"])
def test_names_and_addresses_of_both_kinds_are_endpoints(value: str) -> None:
    assert all(getattr(record(**{field: value}), field) == value for field in ENDPOINTS)


def test_only_what_a_worker_may_lack_can_be_empty() -> None:
    assert record(handoff_endpoint="", events_endpoint="", replay_endpoint="").handoff_endpoint == ""
    with pytest.raises(ValidationError, match="is not host:port"):
        record(endpoint="")


def test_other_files_are_not_read(registry: DirectoryRegistry, tmp_path: Path) -> None:
    registry.publish(record())
    (tmp_path / "registry" / "notes.txt").write_text("not ours")
    assert names(registry) == ["decode"]
    registry.sweep()
    assert (tmp_path / "registry" / "notes.txt").exists()


def test_a_sweep_removes_the_dead_and_keeps_the_living(
    registry: DirectoryRegistry, tmp_path: Path, clock: FakeClock
) -> None:
    registry.publish(record("dead"))
    clock.advance(EXPIRY_S + 1)
    registry.publish(record("alive"))
    (tmp_path / "registry" / "garbage.worker.json").write_bytes(b"garbage")
    assert registry.sweep() == 2
    assert names(registry) == ["alive"]
    assert len(files(tmp_path)) == 1
    assert registry.sweep() == 0


def test_a_sweep_removes_what_a_killed_writer_left_and_no_file_that_is_being_written(
    registry: DirectoryRegistry, tmp_path: Path, clock: FakeClock
) -> None:
    registry.publish(record())
    for name, age_s in (("left", EXPIRY_S + 1), ("new", 0)):
        (tmp_path / "registry" / f".new-{name}").touch()
        written_ns = clock.wall_ns() - int(age_s * 1e9)
        os.utime(tmp_path / "registry" / f".new-{name}", ns=(written_ns, written_ns))
    registry.sweep()
    assert not (tmp_path / "registry" / ".new-left").exists()
    assert (tmp_path / "registry" / ".new-new").exists()


def test_a_worker_may_start_while_the_folder_cannot_be_read(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "registry").write_text("in the way")
    assert DirectoryRegistry(tmp_path / "registry", EXPIRY_S, clock).sweep() == 0


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "file").write_text("in the way")
    registry = DirectoryRegistry(tmp_path / "file" / "registry", EXPIRY_S, clock)
    with pytest.raises(OSError, match="Not a directory"):
        registry.publish(record())


def test_a_folder_that_vanishes_comes_back_with_the_next_heartbeat(registry: DirectoryRegistry, tmp_path: Path) -> None:
    registry.publish(record())
    files(tmp_path)[0].unlink()
    (tmp_path / "registry").rmdir()
    assert registry.snapshot() == []
    registry.publish(record())
    assert names(registry) == ["decode"]


def test_layouts_are_compatible_when_all_but_the_pool_size_is_equal() -> None:
    assert LAYOUT.is_compatible(LAYOUT.model_copy(update={"num_blocks": 7}))
    for field, other in {"dtype": "bfloat16", "block_size": 8, "num_layers": 2, "model_id": "n"}.items():
        assert not LAYOUT.is_compatible(LAYOUT.model_copy(update={field: other})), field
