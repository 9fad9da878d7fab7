"""`kelp scale` on a server that cannot start another worker: it says why, and serves on."""

from __future__ import annotations

from pathlib import Path

import pytest

from kelp.core.config import KelpConfig
from kelp.supervisor import run_state
from kelp.supervisor.plan import ServeOptions
from kelp.supervisor.run_state import WantedWorkers
from kelp.supervisor.serve import Serving
from kelp.supervisor.server import Launch, TritonServer

OPTIONS = ServeOptions(
    config=KelpConfig(),
    host="127.0.0.1",
    http_port=8000,
    grpc_port=8001,
    metrics_port=8002,
    num_prefill=0,
    num_decode=1,
    is_isolated=True,
    startup_timeout_s=60.0,
)


def test_a_disk_without_room_ends_the_scaling_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(server: TritonServer) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TritonServer, "start", refuse)
    said: list[str] = []
    launch = Launch(tmp_path / "tritonserver", {}, tmp_path, tmp_path, tmp_path)
    serving = Serving(OPTIONS, launch, said.append)
    run_state.write_wanted(tmp_path, WantedWorkers(num_prefill=0, num_decode=2))
    serving._follow_wanted()
    assert said[-1] == "not scaled: [Errno 28] No space left on device"
    assert run_state.read_wanted(tmp_path) is None
