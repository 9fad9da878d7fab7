"""Ports, shared memory, run state, and what is refused before Triton starts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kelp.core.config import ExecutorConfig, KelpConfig, ModelConfig
from kelp.core.errors import ConfigError
from kelp.supervisor import ports, preflight, run_state, shm
from kelp.supervisor.plan import ServeOptions
from kelp.supervisor.ports import PortClaims, is_free, pick_free, require_free
from kelp.supervisor.run_state import RunState, WantedWorkers

HOST = "127.0.0.1"
Usage = namedtuple("Usage", "total used free")
MIB = 1 << 20


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.bind((HOST, 0))
        server.listen()
        yield server


def test_a_port_that_somebody_listens_on_is_not_free(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert not is_free(HOST, port)
    listener.close()
    assert is_free(HOST, port)


def test_a_picked_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind((HOST, pick_free(HOST)))


def test_a_claimed_port_is_nobody_elses_until_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    lowest = pick_free(HOST)
    monkeypatch.setattr(ports, "_not_outgoing", lambda: range(lowest, lowest + 1))
    claims = PortClaims()
    assert claims.pick(HOST) == lowest
    with pytest.raises(ConfigError, match=f"no free port on {HOST} among {lowest}-{lowest}"):
        pick_free(HOST)
    claims.release()
    assert pick_free(HOST) == lowest


def test_a_picked_port_is_never_one_that_an_outgoing_connection_may_take() -> None:
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if lowest < 21000 and highest > 64000:
        pytest.skip(f"this machine's outgoing connections take all of {lowest}-{highest}")
    assert all(not lowest <= pick_free(HOST) <= highest for _ in range(50))


def test_a_port_in_use_is_refused_by_option_port_and_holder(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(ConfigError) as raised:
        require_free("--grpc-port", HOST, port)
    text = raised.value.text
    assert text.startswith(f"--grpc-port: port {port} is in use by ")
    assert f"(pid {os.getpid()})" in text
    assert text.endswith("choose another with --grpc-port")
    assert "\n" not in text


def test_a_free_port_is_accepted() -> None:
    require_free("--http-port", HOST, pick_free(HOST))


@pytest.fixture
def shm_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shm, "_FOLDER", tmp_path)
    return tmp_path


def free_shm(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(shm.shutil, "disk_usage", lambda _: Usage(num_bytes, 0, num_bytes))


def test_too_little_shared_memory_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    free_shm(monkeypatch, 63 * MIB)
    with pytest.raises(ConfigError, match="63 MiB free, 4 models need 64 MiB"):
        shm.require_room(4)
    free_shm(monkeypatch, 64 * MIB)
    shm.require_room(4)


def test_a_sweep_removes_the_regions_of_one_server_only(shm_folder: Path) -> None:
    for name in ("kelp_0_8001_a", "kelp_0_8001_b", "kelp_0_80011_c", "kelp_1_8001_d", "psm_other"):
        (shm_folder / name).touch()
    assert shm.sweep("kelp_0_8001_") == 2
    assert sorted(path.name for path in shm_folder.iterdir()) == ["kelp_0_80011_c", "kelp_1_8001_d", "psm_other"]
    assert shm.sweep("kelp_0_8001_") == 0


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run_state.tempfile, "gettempdir", lambda: str(tmp_path))
    return run_state.user_folder()


def state(pid: int) -> RunState:
    return RunState(pid=pid, run_folder=Path("/run"), is_isolated=True, num_prefill=1, num_decode=2)


def test_a_live_run_is_found_by_its_port(user_folder: Path) -> None:
    run_state.write_state(8001, state(os.getpid()))
    assert run_state.read_state(8001) == state(os.getpid())
    assert run_state.read_state(8002) is None
    run_state.remove_state(8001)
    run_state.remove_state(8001)
    assert run_state.read_state(8001) is None


def test_a_run_whose_process_has_ended_is_no_run(user_folder: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    run_state.write_state(8001, state(ended.pid))
    assert run_state.read_state(8001) is None


@pytest.mark.parametrize("garbage", [b"", b"{}", b"\xff", b'{"pid": "x"}'])
def test_a_state_file_that_is_garbage_is_no_run(user_folder: Path, garbage: bytes) -> None:
    (user_folder / "run-8001.json").write_bytes(garbage)
    assert run_state.read_state(8001) is None


def test_only_this_user_may_look_into_the_folder_of_runs(user_folder: Path) -> None:
    assert user_folder.stat().st_mode & 0o777 == 0o700


def test_wanted_numbers_of_workers_travel_through_the_run_folder(tmp_path: Path) -> None:
    assert run_state.read_wanted(tmp_path) is None
    run_state.write_wanted(tmp_path, WantedWorkers(num_prefill=1, num_decode=3))
    assert run_state.read_wanted(tmp_path) == WantedWorkers(num_prefill=1, num_decode=3)
    assert [path.name for path in tmp_path.iterdir()] == ["wanted.json"]


LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(b"w" * 1000)
    return tmp_path


def test_weights_take_twice_their_file_in_float32(model: Path) -> None:
    assert preflight.weight_bytes(model, "bfloat16") == 1000
    assert preflight.weight_bytes(model, "float32") == 2000


@pytest.mark.parametrize(
    ("changes", "head_dim"),
    [({}, 16), ({"head_dim": 32}, 32), ({"num_key_value_heads": None}, 32)],
    ids=["from hidden size", "given", "as many as query heads"],
)
def test_the_kv_pool_is_sized_from_the_models_configuration(
    model: Path, changes: dict[str, object], head_dim: int
) -> None:
    (model / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    executor = ExecutorConfig(num_blocks=10, block_size=16, dtype="float32")
    assert preflight.kv_bytes(model, executor) == 10 * 2 * 2 * (2 * head_dim) * 16 * 4


def test_a_pool_that_sizes_itself_needs_no_room_beforehand(model: Path) -> None:
    assert preflight.kv_bytes(model, ExecutorConfig(num_blocks=0)) == 0


def test_an_unknown_kind_of_model_is_left_to_the_executor(model: Path) -> None:
    (model / "config.json").write_text("{}")
    assert preflight.kv_bytes(model, ExecutorConfig(num_blocks=10)) == 0


def serve_options(model: Path, num_blocks: int = 1, device: str = "cpu", http_port: int = 0) -> ServeOptions:
    executor = ExecutorConfig(num_blocks=num_blocks, device=device)
    return ServeOptions(
        config=KelpConfig(model=ModelConfig(path=model), executor=executor),
        host=HOST,
        http_port=http_port or pick_free(HOST),
        grpc_port=pick_free(HOST),
        metrics_port=pick_free(HOST),
        num_prefill=1,
        num_decode=1,
        is_isolated=False,
        startup_timeout_s=1.0,
    )


@pytest.fixture
def free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two workers' processes and 100 MiB more."""
    memory = namedtuple("memory", "available")(2 * preflight._PROCESS_BYTES + 100 * MIB)
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: memory)
    free_shm(monkeypatch, 1 << 30)


@pytest.mark.usefixtures("free_memory")
def test_what_fits_is_accepted(model: Path) -> None:
    preflight.check(serve_options(model))


@pytest.mark.usefixtures("free_memory")
def test_too_little_memory_is_refused_with_numbers_and_remedies(model: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        preflight.check(serve_options(model, num_blocks=100_000))
    text = raised.value.text
    assert text.startswith("memory: 2 workers need about ")
    assert "900 MiB are free" in text and "--num-blocks" in text
    assert "\n" not in text


@pytest.mark.usefixtures("free_memory")
def test_a_mock_needs_a_process_s_memory_whatever_model_it_plays(model: Path) -> None:
    real = serve_options(model, num_blocks=100_000)
    executor = real.config.executor.model_copy(update={"engine": "mock"})
    config = real.config.model_copy(update={"executor": executor})
    preflight.check(replace(real, config=config, num_decode=7))
    with pytest.raises(ConfigError, match=r"memory: 10 workers need about 1000 MiB, 900 MiB are free"):
        preflight.check(replace(real, config=config, num_decode=9))


@pytest.mark.usefixtures("free_memory")
def test_host_memory_does_not_limit_a_gpu(model: Path) -> None:
    preflight.check(serve_options(model, num_blocks=100_000, device="cuda:0"))


@pytest.mark.usefixtures("free_memory")
def test_a_port_in_use_is_refused_before_anything_starts(model: Path, listener: socket.socket) -> None:
    with pytest.raises(ConfigError, match="--http-port"):
        preflight.check(serve_options(model, http_port=listener.getsockname()[1]))


@pytest.mark.usefixtures("free_memory")
def test_an_adapter_without_its_files_is_refused_before_anything_starts(model: Path, tmp_path: Path) -> None:
    options = serve_options(model)
    adapted = options.config.model.model_copy(update={"lora_adapters": {"sql": tmp_path / "sql"}})
    config = options.config.model_copy(update={"model": adapted})
    with pytest.raises(ConfigError, match=r"model\.lora_adapters: .*sql/adapter_config\.json"):
        preflight.check(replace(options, config=config))


@pytest.mark.parametrize("what", ["writable by others", "a link", "a file"])
def test_a_folder_that_others_can_change_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(run_state.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"kelp-{os.getuid()}"
    if what == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif what == "a file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(ConfigError, match=f"{folder}: others may write there"):
        run_state.user_folder()


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_state.tempfile, "gettempdir", lambda: str(tmp_path))
    assert run_state.user_folder() == run_state.user_folder() == tmp_path / f"kelp-{os.getuid()}"
    other = os.getuid() + 1
    (tmp_path / f"kelp-{other}").mkdir(mode=0o700)
    monkeypatch.setattr(run_state.os, "getuid", lambda: other)
    with pytest.raises(ConfigError, match="others may write there"):
        run_state.user_folder()
