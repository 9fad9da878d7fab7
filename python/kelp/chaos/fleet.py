"""A `kelp serve` of our own in a temporary folder: how it is started, found again piece by piece, and stopped.

Everything it starts inherits TMPDIR, which is the mark that its processes are known by, whoever their parent is.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import psutil

from kelp.chaos.fleet_spec import HOST, FleetSpec
from kelp.chaos.leaks import SHARED_MEMORY
from kelp.chaos.room import Room, make_room
from kelp.chaos.store_relay import StoreRelay
from kelp.client.base import WorkerAddress
from kelp.client.grpc import GrpcWorkerClient
from kelp.core.config import CONFIG_ENV, load_config
from kelp.core.errors import ConfigError, KelpError
from kelp.core.messages import WorkerStatus
from kelp.core.peer_auth import PeerToken, load_token
from kelp.core.schema import KV_BLOCK_MANAGER, LLM, PREPROCESS
from kelp.core.types import WorkerState
from kelp.registry.base import WorkerRecord
from kelp.registry.directory import DirectoryRegistry, KvManagerDirectory
from kelp.supervisor.ports import pick_free

_START_S = 240.0
_STOP_S = 60.0
_POLL_S = 0.1
_EXPIRY_S = 5.0
_STATUS_S = 5.0
_READY_LINE = "Ctrl-C stops it."
_MARK = "TMPDIR"
_END_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
"""PR_SET_PDEATHSIG, SIGTERM: no orphan when we die without having said goodbye (Linux, prctl(2)). Not in a function
that runs between fork and exec: gRPC, which this process uses, breaks there."""
_SERVER = re.compile(r"bin/tritonserver .*--grpc-port=(\d+)")
_STUB = re.compile(r"(?:^|\s)([a-z0-9_]+?)_0_\d+(?:\s|$)")
_METRICS = re.compile(r"--metrics-port=(\d+)")
_LAST_LINES = 6


class ServedFleet:
    """One `kelp serve`; methods block unless they are coroutines.

    Args:
        folder: Empty; everything that the fleet writes outside of shared memory lands below it.

    Attributes:
        room: Its own /dev/shm and disk while it runs, where the machine lets us make them,
        no_room: and why not, elsewhere.
        store_relay: On the way to its object store, if it has one.
    """

    def __init__(self, spec: FleetSpec, folder: Path) -> None:
        self.spec = spec
        self.folder = folder
        self.temporary = folder / "tmp"
        self.disk = folder / "disk"
        self.http_port, self.grpc_port, self.metrics_port = (pick_free(HOST) for _ in range(3))
        self.room: Room | None = None
        self.no_room = ""
        self.store_relay: StoreRelay | None = None
        self._log = folder / "kelp-serve.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[str, WorkerRecord] = {}

    def __enter__(self) -> ServedFleet:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        if self.room is not None:
            self.room.close()
            self.room = None

    @property
    def endpoint(self) -> str:
        """Where clients ask."""
        return f"{HOST}:{self.grpc_port}"

    @property
    def supervisor(self) -> psutil.Process:
        """`kelp serve` itself."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    @property
    def registry(self) -> Path:
        """The registry's folder."""
        return next(iter(self.temporary.glob("kelp-*/serve-*/registry")), self.temporary / "registry")

    @property
    def output(self) -> str:
        """What `kelp serve` has said so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def start(self) -> None:
        """Start and wait until it is ready.

        Raises:
            ConfigError: It did not come up; quotes its last words.
        """
        self.temporary.mkdir(parents=True)
        self.room, self.no_room = make_room(self.folder, self.disk)
        if self.spec.store is not None:
            self.store_relay = StoreRelay(self.spec.store.host, self.spec.store.port, pick_free(HOST))
            self.store_relay.start()
        command = self._command()
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_ready()
            if self.room is not None:
                self.room.enter(self._process.pid)
        except BaseException:
            self.stop()
            raise

    def seen(self, path: Path) -> Path:
        """How a path of the fleet's is reached from here, while it runs."""
        return path if self.room is None else self.room.view(path)

    @property
    def memory(self) -> Path:
        """How its /dev/shm is reached from here, also once it has been stopped."""
        return SHARED_MEMORY if self.room is None else self.room.memory

    def _command(self) -> list[str]:
        ports = ("--http-port", self.http_port, "--grpc-port", self.grpc_port, "--metrics-port", self.metrics_port)
        settings = {"disk_tier.path": str(self.disk)}
        if self.spec.store is not None and self.store_relay is not None:
            settings |= self.spec.store.settings(self.store_relay.endpoint)
        serve = [
            *(str(Path(sys.executable).with_name("kelp")), "serve", *self.spec.arguments(), *map(str, ports)),
            *(part for name, value in settings.items() for part in ("--set", f"{name}={value}")),
        ]
        inside = serve if self.room is None else self.room.around(serve)
        return [sys.executable, "-c", _END_WITH_PARENT, str(shutil.which(inside[0])), *inside[1:]]

    def stop(self) -> int | None:
        """SIGTERM, SIGKILL if that does not help; the exit code, None after SIGKILL."""
        if self.store_relay is not None:
            self.store_relay.close()
            self.store_relay = None
        if self._process is None:
            return 0
        code: int | None = None
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_STOP_S)
        self._process.kill()
        self._process.wait()
        self._process = None
        return code

    def save_logs(self, folder: Path) -> None:
        """Copy what the supervisor and the tritonservers have said so far."""
        folder.mkdir(exist_ok=True)
        for path in (self._log, *self.temporary.glob("kelp-*/serve-*/*.log")):
            shutil.copy(path, folder / path.name)

    def processes(self) -> list[psutil.Process]:
        """Living processes with this fleet's mark."""
        return list(_marked(str(self.temporary)))

    def servers(self) -> dict[int, psutil.Process]:
        """Tritonservers by gRPC port."""
        found = {}
        for process, command in self._commands():
            if match := _SERVER.search(command):
                found[int(match.group(1))] = process
        return found

    def metrics_ports(self) -> list[int]:
        """Of all tritonservers that run."""
        commands = (command for _, command in self._commands() if _SERVER.search(command))
        return [int(match.group(1)) for command in commands if (match := _METRICS.search(command))]

    def stubs(self, model: str) -> list[psutil.Process]:
        """The processes of a model, one per instance."""
        return [process for process, command in self._commands() if _model_of(command) == model]

    def server_of(self, worker: str) -> psutil.Process | None:
        """The tritonserver that a worker runs in."""
        record = self.records().get(worker)
        return None if record is None else self.servers().get(int(record.endpoint.rpartition(":")[2]))

    def records(self) -> dict[str, WorkerRecord]:
        """Registered live workers by the name of their model; those last seen while the registry is away."""
        with contextlib.suppress(OSError):
            snapshot = DirectoryRegistry(self.registry, _EXPIRY_S).snapshot()
            self._known = {record.model_name: record for record in snapshot}
        return self._known

    def manager_address(self) -> WorkerAddress | None:
        """Of the KV block manager; None where none is registered."""
        with contextlib.suppress(OSError):
            for record in KvManagerDirectory(self.registry, _EXPIRY_S).snapshot():
                return WorkerAddress(record.endpoint, record.model_name, epoch=record.epoch)
        return None

    def missing(self) -> list[str]:
        """Models without all of their processes, and workers that are not ready.

        A record alone does not tell: that of a worker that has been killed lives on for a while, or until the registry
        is back; routers know nothing of its successor.
        """
        singles = (PREPROCESS.name, KV_BLOCK_MANAGER.name) if self.spec.has_manager else (PREPROCESS.name,)
        expected = {LLM.name: self.spec.num_routers, **dict.fromkeys(singles, 1)}
        processes = [(_model_of(command), process.create_time()) for process, command in self._commands()]
        present, started_s = Counter(name for name, _ in processes), dict(processes)
        absent = [name for name, count in expected.items() if present[name] < count]
        records = self.records()
        unready = [
            name
            for name in (*self.spec.prefill_workers, *self.spec.decode_workers)
            if name not in records
            or records[name].state is not WorkerState.READY
            or records[name].heartbeat_ns / 1e9 < started_s.get(name, math.inf)
        ]
        return absent + unready

    def token(self) -> PeerToken | None:
        """What makes this fleet's processes take us for one of their own."""
        config = next(iter(self.temporary.glob("kelp-*/serve-*/kelp.yaml")), None)
        return load_token(load_config(path=config).peers) if config else None

    def worker_client(self) -> GrpcWorkerClient:
        """A client of this fleet's workers; made on the event loop."""
        return GrpcWorkerClient(self.token())

    async def status(self, worker: str, client: GrpcWorkerClient) -> WorkerStatus | None:
        """What a worker holds; None when it does not answer."""
        record = self.records().get(worker)
        if record is None:
            return None
        try:
            address = WorkerAddress(record.endpoint, record.model_name, epoch=record.epoch)
            return await asyncio.wait_for(client.control(address, None), _STATUS_S)
        except (KelpError, asyncio.TimeoutError):
            return None

    def _commands(self) -> Iterator[tuple[psutil.Process, str]]:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                yield process, " ".join(process.cmdline())

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name != CONFIG_ENV}
        credentials = dict(self.spec.store.credentials) if self.spec.store is not None else {}
        return {**inherited, **credentials, _MARK: str(self.temporary)}

    def _wait_ready(self) -> None:
        assert self._process is not None
        deadline_s = time.monotonic() + _START_S
        while _READY_LINE not in self.output:
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                last = " | ".join(self.output.strip().splitlines()[-_LAST_LINES:])
                raise ConfigError(f"kelp serve did not come up: {last or 'no output'}")
            time.sleep(_POLL_S)


def _model_of(command: str) -> str:
    """Whose process a command line is; empty for anything else."""
    found = _STUB.search(command)
    return found.group(1) if found else ""


def _marked(temporary: str) -> Iterator[psutil.Process]:
    own = os.getuid()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.uids().real == own
                and process.status() != psutil.STATUS_ZOMBIE
                and process.environ().get(_MARK) == temporary
            ):
                yield process
