"""Dynamo's frontend with its mocker, as the figures in docs/benchmarks.md have them: no etcd, no NATS, loopback only.

The mocker runs at a speed-up of 10,000: its "infinite" setting (0) makes it slow in 1.6.1.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kelp.supervisor.ports import pick_free
from perf.machine import REPOSITORY
from perf.suite import BenchError

PYTHON = REPOSITORY / "perf" / "peers" / "dynamo" / "bin" / "python"
MODEL_NAME = "tiny"
VERSION = "1.6.1"
HOST = "127.0.0.1"

_SPEEDUP = "10000"
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 15.0
_POLL_S = 0.3
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class DynamoDeployment:
    """Dynamo, answering at `HOST`; `pids` are all its processes by name."""

    http_port: int
    pids: dict[str, int]


def _environment(work: Path) -> dict[str, str]:
    """All four addresses are needed to stay on loopback."""
    own = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(work / "kv"),
        "DYN_EVENT_PLANE": "zmq",
        "DYN_TCP_RPC_HOST": HOST,
        "DYN_TCP_RESPONSE_STREAM_HOST": HOST,
        "DYN_EVENT_PLANE_HOST": HOST,
        "DYN_LOG": "error",
        "HF_HUB_OFFLINE": "1",
    }
    return {**os.environ, **own}


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _process(name: str, arguments: list[str], work: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (work / f"{name}.log").open("wb") as output:
        process = subprocess.Popen(
            [str(PYTHON), "-m", f"dynamo.{name}", *arguments],
            cwd=work,
            env=_environment(work),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
        process.kill()
        process.wait()


def _has_model(http_port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{http_port}/v1/models", timeout=2.0) as response:
            return any(model["id"] == MODEL_NAME for model in json.load(response)["data"])
    except (urllib.error.URLError, ConnectionError, TimeoutError, ValueError, KeyError):
        return False


def _wait_for_model(http_port: int, processes: dict[str, subprocess.Popen[bytes]], work: Path) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not _has_model(http_port):
        for name, process in processes.items():
            if process.poll() is not None:
                last = (work / f"{name}.log").read_text(errors="replace").strip().splitlines() or ["no output"]
                raise BenchError(f"dynamo.{name}: exit status {process.returncode}: {last[-1][:300]}")
        if time.monotonic() > deadline_s:
            raise BenchError(f"dynamo: no model after {_START_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)


@contextmanager
def running(model_folder: Path, num_workers: int, work: Path) -> Iterator[DynamoDeployment]:
    """Serve while the block runs, with KV-aware routing.

    Raises:
        BenchError: It is not installed, or does not come up.
    """
    if not PYTHON.is_file():
        raise BenchError("dynamo: not installed; run scripts/install_peers.sh dynamo")
    work.mkdir(parents=True, exist_ok=True)
    port = pick_free(HOST)
    frontend = ["--router-mode", "kv", "--http-host", HOST, "--http-port", str(port)]
    mocker = ["--model-path", str(model_folder), "--model-name", MODEL_NAME, "--num-workers", str(num_workers)]
    mocker += ["--speedup-ratio", _SPEEDUP, "--num-gpu-blocks-override", "16384", "--max-num-seqs", "256"]
    with ExitStack() as stack:
        processes = {
            "frontend": stack.enter_context(_process("frontend", frontend, work)),
            "mocker": stack.enter_context(_process("mocker", mocker, work)),
        }
        _wait_for_model(port, processes, work)
        yield DynamoDeployment(port, {name: process.pid for name, process in processes.items()})
