"""A dead KV block manager is loaded again; what is left of one is removed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from kelp.core.config import load_config
from kelp.registry.base import KvManagerRecord
from kelp.registry.directory import KvManagerDirectory
from kelp.supervisor import kv_manager
from kelp.supervisor.kv_manager import KvManagerWatch, remove_arenas

RECORD = KvManagerRecord(manager_id="h:1/m", epoch="e", host="h", endpoint="h:1", model_name="m")


class ControlDouble:
    """Keeps what was loaded."""

    loaded: list[dict[str, object]] = []

    def __init__(self, endpoint: str) -> None:
        pass

    def load(self, name: str, config: dict[str, object]) -> None:
        self.loaded.append(config)

    def close(self) -> None:
        pass


class Time:
    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(kv_manager, "time", clock)
    monkeypatch.setattr(kv_manager, "TritonControl", ControlDouble)
    monkeypatch.setattr(ControlDouble, "loaded", [])
    return clock


def server(*models: str, is_running: bool = True) -> SimpleNamespace:
    spec = SimpleNamespace(on_disk_models=models, grpc_endpoint="h:1")
    return SimpleNamespace(spec=spec, log_path=Path("log"), is_running=lambda: is_running)


def test_a_manager_whose_record_has_run_out_is_loaded_again_each_time_differently(tmp_path: Path, clock: Time) -> None:
    config = load_config({"registry.path": str(tmp_path), "registry.heartbeat_s": "1"})
    watch, servers = KvManagerWatch(config, lambda _: None), [server("prefill"), server("kv_block_manager", "llm")]
    KvManagerDirectory(tmp_path, 5.0).publish(RECORD)
    clock.now_s = 100.0
    watch.check(servers)
    assert ControlDouble.loaded == []
    KvManagerDirectory(tmp_path, 5.0).withdraw(RECORD.manager_id, RECORD.epoch)
    for clock.now_s in (100.9, 101.1, 101.2, 102.5):
        watch.check(servers)
    assert len(ControlDouble.loaded) == 2
    assert ControlDouble.loaded[0] != ControlDouble.loaded[1]


@pytest.mark.parametrize("servers", [[], [server("llm")], [server("kv_block_manager", is_running=False)]])
def test_a_manager_without_a_running_server_is_left_to_whoever_restarts_that(
    tmp_path: Path, clock: Time, servers: list[SimpleNamespace]
) -> None:
    watch = KvManagerWatch(load_config({"registry.path": str(tmp_path)}), lambda _: None)
    clock.now_s = 1000.0
    watch.check(servers)
    assert ControlDouble.loaded == []


def test_arenas_of_this_run_and_of_dead_ones_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_manager, "default_arena_folder", lambda: tmp_path)
    alive = {8101}
    monkeypatch.setattr(kv_manager.run_state, "read_state", lambda port: port if port in alive else None)
    for name in ("serve-8001", "serve-8101", "serve-8201", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "arena-0").touch()
    remove_arenas(load_config({"kv_manager.arena_folder": str(tmp_path / "serve-8001")}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "serve-8101"]
