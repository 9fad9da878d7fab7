"""A real `kelp serve`: started through the CLI on free loopback ports, stopped by SIGTERM, checked for leftovers.

with KelpServer(isolate=True).start() as server:
    answer = server.ask(text_input="The capital of France is", max_tokens=8)
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from kelp.client.base import WorkerAddress
from kelp.client.grpc import GrpcWorkerClient
from kelp.core.config import CONFIG_ENV, load_config
from kelp.core.errors import ConfigError
from kelp.core.messages import WorkerStatus
from kelp.core.peer_auth import PeerToken, load_token
from kelp.registry.base import WorkerRecord
from kelp.registry.directory import DirectoryRegistry
from kelp.supervisor import run_state
from kelp.supervisor.model import is_intact, models_folder
from kelp.supervisor.ports import PortClaims
from kelp.supervisor.triton import find_triton
from support.llm_client import Answer, Call, ask
from support.waiting import wait_until

CLI = Path(sys.executable).with_name("kelp")
HOST = "127.0.0.1"
MODEL = models_folder() / "default"
CLEAN_STOP_S = 60.0
"""Triton's own exit timeout, the supervisor's grace before it kills, and room for a loaded machine."""
_START_S = 240.0
_READY_LINE = "Ctrl-C stops it."
_EXPIRY_S = 5.0


def why_not() -> str | None:
    """What this machine lacks for serving, or None."""
    if importlib.util.find_spec("nixl") is None:
        return "nixl is not installed (make setup)"
    if not CLI.is_file():
        return f"{CLI} is not installed (make setup)"
    if not is_intact(MODEL):
        return f"the default model is not in {MODEL} (make setup)"
    try:
        find_triton()
    except ConfigError as error:
        return error.text
    return None


_PORTS = PortClaims()
"""Held until this process ends: tests of another one start servers at the same time."""


def free_ports(count: int) -> list[int]:
    """Different ports that nobody uses, and nobody else's test takes."""
    return [_PORTS.pick(HOST) for _ in range(count)]


def new_log(prefix: str) -> Path:
    """An empty file for a process's output."""
    with tempfile.NamedTemporaryFile(prefix=prefix, suffix=".log", delete=False) as file:
        return Path(file.name)


def shm_regions(grpc_port: int) -> list[str]:
    """Triton's shared-memory regions of one server."""
    return sorted(path.name for path in Path("/dev/shm").glob(f"kelp_{os.getuid()}_{grpc_port}_*"))


def clean_environment() -> dict[str, str]:
    """This process's environment without a configuration of its own."""
    return {name: value for name, value in os.environ.items() if name != CONFIG_ENV}


class KelpServer:
    """One `kelp serve`.

    Args:
        mode: `disaggregated` or `aggregated`.
        isolate: One tritonserver per worker.
        settings: Configuration fields, as `--set` takes them.
        arguments: Further options of `kelp serve`.
    """

    def __init__(
        self,
        mode: str = "disaggregated",
        *,
        isolate: bool = False,
        dtype: str = "float32",
        num_blocks: int = 512,
        settings: dict[str, object] | None = None,
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self._arguments = [
            *(str(CLI), "serve", "--mode", mode, "--dtype", dtype, "--num-blocks", str(num_blocks)),
            *("--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)),
            *("--metrics-port", str(self.metrics_port)),
            *(["--isolate"] if isolate else []),
            *(part for key, value in (settings or {}).items() for part in ("--set", f"{key}={value}")),
            *arguments,
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._output_path = new_log("kelp-serve-")
        self.run_folder = Path()

    def start(self) -> KelpServer:
        """Start and wait until it says that it is ready."""
        with self._output_path.open("wb") as output:
            self._process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=clean_environment(),
                start_new_session=True,
            )
        process = self._process
        try:
            wait_until(lambda: process.poll() is not None or _READY_LINE in self.output, "ready", _START_S)
            assert process.poll() is None, f"kelp serve ended: {self.output}"
        except BaseException:
            self.kill()
            raise
        state = run_state.read_state(self.grpc_port)
        assert state is not None and state.pid == process.pid
        self.run_folder = state.run_folder
        return self

    def __enter__(self) -> KelpServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    @property
    def output(self) -> str:
        """What `kelp serve` has printed so far."""
        return self._output_path.read_text(errors="replace")

    @property
    def http_url(self) -> str:
        return f"http://{HOST}:{self.http_port}"

    @property
    def grpc_endpoint(self) -> str:
        return f"{HOST}:{self.grpc_port}"

    @property
    def registry_folder(self) -> Path:
        return self.run_folder / "registry"

    @property
    def peer_token(self) -> PeerToken | None:
        """What its processes know each other by."""
        return load_token(load_config(path=self.run_folder / "kelp.yaml").peers)

    @property
    def pid(self) -> int:
        """Of `kelp serve` itself."""
        assert self._process is not None
        return self._process.pid

    def log(self, name: str = "kelp") -> str:
        """Log of a tritonserver: `kelp` is the public one, `kelp-<worker>` one of the isolated layout."""
        return (self.run_folder / f"{name}.log").read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """`kelp serve`, its tritonservers and their stubs."""
        if self._process is None or self._process.poll() is not None:
            return []
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def tritonservers(self) -> dict[int, psutil.Process]:
        """Running tritonservers by their gRPC port."""
        found = {}
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                command = " ".join(process.cmdline())
                if match := re.search(r"bin/tritonserver .*--grpc-port=(\d+)", command):
                    found[int(match.group(1))] = process
        return found

    def stub(self, model: str) -> psutil.Process:
        """The process behind a model."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if f"{model}_0_0" in process.cmdline():
                    return process
        raise AssertionError(f"no stub of {model}")

    def records(self) -> dict[str, WorkerRecord]:
        """Registered live workers by model name."""
        snapshot = DirectoryRegistry(self.registry_folder, _EXPIRY_S).snapshot()
        return {record.model_name: record for record in snapshot}

    def statuses(self) -> dict[str, WorkerStatus]:
        """What each registered worker holds, asked of the workers themselves."""
        return asyncio.run(_statuses(self.records()))

    def wait_quiet(self, timeout_s: float = 30.0) -> dict[str, WorkerStatus]:
        """Wait until no worker holds anything for a request: no sequence, no lease, no referenced block."""
        seen: dict[str, WorkerStatus] = {}

        def is_quiet() -> bool:
            seen.clear()
            seen.update(self.statuses())
            return bool(seen) and all(_is_quiet(status) for status in seen.values())

        try:
            wait_until(is_quiet, "a quiet server", timeout_s)
        except AssertionError:
            raise AssertionError(f"not quiet after {timeout_s:.0f} s: {seen}") from None
        return seen

    def open(self, **fields: Any) -> Call:
        """A streaming request under way; close it by `with`."""
        return Call(self.grpc_endpoint, {"stream": True, **fields})

    def ask(self, **fields: Any) -> Answer:
        """One request to its end, over the gRPC stream API."""
        return ask(self.grpc_endpoint, fields)

    def stop(self) -> None:
        """SIGTERM, and assert that nothing is left: exit code 0, no process, no region, no run folder, no state."""
        assert self._process is not None
        family, ports = self.family(), [self.grpc_port, *self.tritonservers()]
        os.kill(self._process.pid, signal.SIGTERM)
        try:
            code = self._process.wait(CLEAN_STOP_S)
        except subprocess.TimeoutExpired:
            output = self.output
            self.kill()
            raise AssertionError(f"still running {CLEAN_STOP_S:.0f} s after SIGTERM: {output}") from None
        output = self.output
        self._output_path.unlink()
        assert code == 0, output
        alive = [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        assert not alive, f"left running: {alive}"
        left = [region for port in ports for region in shm_regions(port)]
        assert not left, f"left in /dev/shm: {left}"
        assert not self.run_folder.exists()
        assert run_state.read_state(self.grpc_port) is None

    def kill(self) -> None:
        """The hard way, for a test that has already failed."""
        family, ports = self.family(), [self.grpc_port, *self.tritonservers()]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process is not None:
            self._process.wait()
        for port in ports:
            for region in shm_regions(port):
                (Path("/dev/shm") / region).unlink(missing_ok=True)
        run_state.remove_state(self.grpc_port)
        self._output_path.unlink(missing_ok=True)


def run_cli(*arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """One `kelp` command to its end."""
    return subprocess.run(
        [str(CLI), *arguments], capture_output=True, text=True, timeout=timeout_s, env=clean_environment(), check=False
    )


def _is_quiet(status: WorkerStatus) -> bool:
    return (
        status.num_running == status.num_waiting == status.num_leases == 0
        and status.num_free_blocks + status.num_cached_blocks == status.num_blocks
    )


async def _statuses(records: dict[str, WorkerRecord]) -> dict[str, WorkerStatus]:
    client = GrpcWorkerClient()
    try:
        return {
            name: await client.control(WorkerAddress(record.endpoint, record.model_name), None)
            for name, record in records.items()
        }
    finally:
        await client.close()
