"""A server under test: `kelp serve` as a user starts it, on free ports, stopped whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from kelp.supervisor.ports import pick_free
from perf.machine import REPOSITORY
from perf.serving.processes import find_processes
from perf.suite import BenchError

_HOST = "127.0.0.1"
_START_TIMEOUT_S = 240.0
_STOP_TIMEOUT_S = 45.0
_REQUEST_TIMEOUT_S = 30.0
_POLL_S = 0.2
_MAX_STARTS = 3
_PORT_TAKEN = ("already in use", "is in use by")
"""As tritonserver and `kelp serve` say it."""
_PR_SET_PDEATHSIG = 1

WORKERS_OF_MODE = {"aggregated": ("decode",), "disaggregated": ("prefill", "decode")}
"""Models that must have served a request of each mode."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A server that answers."""

    mode: str
    grpc_endpoint: str
    metrics_url: str
    pids: dict[str, int]

    @property
    def num_workers(self) -> int:
        """Workers that take part in every request."""
        return len(WORKERS_OF_MODE[self.mode])


@dataclass(frozen=True, slots=True)
class Variant:
    """What is special about a server.

    Attributes:
        name: Of its log.
        options: Of `kelp serve`, beside mode, host and ports.
        environment: Added to this process's own.
    """

    name: str
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Ports:
    http: int
    grpc: int
    metrics: int


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _start(mode: str, variant: Variant, ports: _Ports, log: Path) -> subprocess.Popen[bytes]:
    command = [
        *(str(Path(sys.executable).parent / "kelp"), "serve", "--mode", mode, "--host", _HOST),
        *("--http-port", str(ports.http), "--grpc-port", str(ports.grpc), "--metrics-port", str(ports.metrics)),
        *variant.options,
    ]
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **variant.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


def _ask_once(http_port: int) -> int:
    """Send a tiny request and return how many workers took part; 0 while it is not answered."""
    request = urllib.request.Request(
        f"http://{_HOST}:{http_port}/v2/models/llm/generate",
        data=json.dumps({"text_input": "ready?", "max_tokens": 2, "ignore_eos": True}).encode(),
    )
    try:
        with urllib.request.urlopen(request, timeout=_REQUEST_TIMEOUT_S) as response:
            worker_ids = json.load(response).get("worker_ids", [])
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError):
        return 0
    return len(worker_ids) if isinstance(worker_ids, list) else 1


def _wait_until_it_answers(mode: str, process: subprocess.Popen[bytes], http_port: int, log: Path) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    needed = len(WORKERS_OF_MODE[mode])
    while _ask_once(http_port) != needed:
        if process.poll() is not None:
            raise BenchError(f"kelp serve --mode {mode}: exit status {process.returncode}: {_last_line(log)}")
        if time.monotonic() > deadline_s:
            raise BenchError(f"kelp serve --mode {mode}: no answer of {needed} workers after {_START_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def _stop(process: subprocess.Popen[bytes]) -> None:
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    if process.poll() is None:
        process.kill()
        process.wait()
    for survivor in family:
        # psutil compares creation times, so a process id used anew is never hit.
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    psutil.wait_procs(family, timeout=5.0)


def _start_on_free_ports(mode: str, variant: Variant, log: Path) -> tuple[subprocess.Popen[bytes], _Ports]:
    """A server that answers; started anew if somebody else has taken one of its ports meanwhile."""
    num_starts = 0
    while True:
        num_starts += 1
        ports = _Ports(pick_free(_HOST), pick_free(_HOST), pick_free(_HOST))
        process = _start(mode, variant, ports, log)
        try:
            _wait_until_it_answers(mode, process, ports.http, log)
        except BaseException as error:
            _stop(process)
            is_port_taken = isinstance(error, BenchError) and any(text in str(error) for text in _PORT_TAKEN)
            if not is_port_taken or num_starts == _MAX_STARTS:
                raise
            continue
        return process, ports


@contextmanager
def running(mode: str, logs: Path, variant: Variant | None = None) -> Iterator[Deployment]:
    """Serve in a mode while the block runs; with default options unless a variant says otherwise.

    Raises:
        BenchError: The server does not come up; quotes its last words.
    """
    variant = variant or Variant(mode)
    process, ports = _start_on_free_ports(mode, variant, logs / f"{variant.name}.log")
    try:
        pids = find_processes(process.pid)
        yield Deployment(mode, f"{_HOST}:{ports.grpc}", f"http://{_HOST}:{ports.metrics}/metrics", pids)
    finally:
        _stop(process)
