"""kelp with mock workers that take no time: `kelp serve` as a user starts it, on free ports.

A mock says its first token in a step of its own and the other 63 in the next: 62 more steps of an engine that is not
there are no part of the request's way. There is no block manager, because the peer runs without one, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from kelp.supervisor.ports import pick_free
from perf.machine import REPOSITORY
from perf.serving.processes import find_processes
from perf.suite import BenchError

HOST = "127.0.0.1"

_SETTINGS = (
    "executor.engine=mock",
    "mock.speedup=0",
    "mock.tokens_per_step=64",
    "executor.num_blocks=16384",
    "executor.max_running=256",
    "kv_manager.enabled=false",
)
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 45.0
_POLL_S = 0.3
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class KelpDeployment:
    """kelp, answering at `HOST`; `pids` are all its processes by name."""

    http_port: int
    pids: dict[str, int]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _command(model_folder: Path, num_workers: int, ports: tuple[int, int, int]) -> list[str]:
    http_port, grpc_port, metrics_port = ports
    return [
        *(str(Path(sys.executable).parent / "kelp"), "serve", "--model", str(model_folder), "--host", HOST),
        *("--mode", "aggregated", "--decode", str(num_workers)),
        *("--http-port", str(http_port), "--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port)),
        *(part for setting in _SETTINGS for part in ("--set", setting)),
    ]


def _are_ready(http_port: int, names: list[str]) -> bool:
    try:
        for name in names:
            with urllib.request.urlopen(f"http://{HOST}:{http_port}/v2/models/{name}/ready", timeout=2.0):
                pass
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def _wait_ready(process: subprocess.Popen[bytes], http_port: int, num_workers: int, log: Path) -> None:
    names = ["llm", "decode", *(f"decode_{index}" for index in range(1, num_workers))]
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not _are_ready(http_port, names):
        if process.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            raise BenchError(f"kelp serve: exit status {process.returncode}: {last[-1][:300]}")
        if time.monotonic() > deadline_s:
            raise BenchError(f"kelp serve: not ready after {_START_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    process.kill()
    process.wait()
    for survivor in family:
        # psutil compares creation times, so a process id used anew is never hit.
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    psutil.wait_procs(family, timeout=5.0)


@contextmanager
def running(model_folder: Path, num_workers: int, work: Path) -> Iterator[KelpDeployment]:
    """Serve while the block runs.

    Raises:
        BenchError: The server does not come up; quotes its last words.
    """
    work.mkdir(parents=True, exist_ok=True)
    ports = (pick_free(HOST), pick_free(HOST), pick_free(HOST))
    log = work / "kelp.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(model_folder, num_workers, ports),
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    try:
        _wait_ready(process, ports[0], num_workers, log)
        yield KelpDeployment(ports[0], {"serve": process.pid, **find_processes(process.pid)})
    finally:
        _stop(process)
