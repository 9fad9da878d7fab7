"""`kelp serve`: start the planned servers, keep them running, stop everything at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil

from kelp.core.errors import KelpError
from kelp.core.schema import KV_BLOCK_MANAGER
from kelp.supervisor import run_state
from kelp.supervisor.farewell import take_leave
from kelp.supervisor.kv_manager import remove_arenas
from kelp.supervisor.plan import (
    ServeOptions,
    ServerSpec,
    isolated_server,
    plan_servers,
    worker_names,
    write_config,
)
from kelp.supervisor.ports import PortClaims
from kelp.supervisor.server import Launch, TritonServer
from kelp.supervisor.stop_signals import StopRequested, StopSignals
from kelp.supervisor.supervised import Supervised

_WATCH_S = 0.5
_RUN_PREFIX, _OWNER = "serve-", "owner.pid"
_KEEP_LOGS_S = 86400.0
Say = Callable[[str], None]


class Serving:
    """All servers of one `kelp serve`."""

    def __init__(self, options: ServeOptions, launch: Launch, say: Say) -> None:
        self._options = options
        self._launch = launch
        self._say = say
        self._servers: list[Supervised] = []
        self._signals = StopSignals()
        self._is_open = False

    def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            KelpError: A server did not come up.
        """
        self._signals.install()
        try:
            self._serve(on_ready)
        except StopRequested:
            self._say("stopping")
            self._take_leave()
        finally:
            self._signals.ignore()
            self._stop_all()

    def _serve(self, on_ready: Callable[[], None]) -> NoReturn:
        options = self._options
        write_config(options.config, self._launch.run_folder / "kelp.yaml")
        with PortClaims() as ports:
            self._start_all(plan_servers(options, ports.pick))
        self._publish(options.num_prefill, options.num_decode)
        on_ready()
        self._is_open = True
        while True:
            time.sleep(_WATCH_S)
            self._follow_wanted()
            for supervised in list(self._servers):
                supervised.watch(options.startup_timeout_s, self._signals)

    def _start_all(self, specs: list[ServerSpec]) -> None:
        started: list[Supervised] = []
        rules = self._options.config.supervision
        for spec in specs:
            self._say(f"starting tritonserver for {', '.join(spec.model_names)} (gRPC {spec.grpc_endpoint})")
            supervised = Supervised(TritonServer(self._launch, spec), rules, self._say)
            self._servers.append(supervised)
            started.append(supervised)
            with self._signals.held():
                supervised.server.start()
        for supervised in started:
            started_s = time.monotonic()
            supervised.server.wait_ready(self._options.startup_timeout_s)
            names = ", ".join(supervised.server.spec.model_names)
            self._say(f"ready: {names} ({time.monotonic() - started_s:.1f} s)")

    def _follow_wanted(self) -> None:
        wanted = run_state.read_wanted(self._launch.run_folder)
        if not self._options.is_isolated or wanted is None:
            return
        try:
            self._scale(wanted)
        except KelpError as error:
            self._say(f"not scaled: {error.text}")
        except OSError as error:
            self._say(f"not scaled: {error}")
        finally:
            run_state.clear_wanted(self._launch.run_folder)

    def _scale(self, wanted: run_state.WantedWorkers) -> None:
        workers = worker_names("prefill", wanted.num_prefill) + worker_names("decode", wanted.num_decode)
        names = {f"kelp-{worker.name}" for worker in workers} | {"kelp", f"kelp-{KV_BLOCK_MANAGER.name}"}
        self._stop_servers([item for item in self._servers if item.server.spec.name not in names])
        running = {supervised.server.spec.name for supervised in self._servers}
        missing = [worker for worker in workers if f"kelp-{worker.name}" not in running]
        num_before = len(self._servers)
        try:
            with PortClaims() as ports:
                self._start_all([isolated_server(worker, self._options.host, ports.pick) for worker in missing])
        except (KelpError, OSError):
            self._stop_servers(self._servers[num_before:])
            raise
        self._publish(wanted.num_prefill, wanted.num_decode)

    def _stop_servers(self, servers: list[Supervised]) -> None:
        for supervised in servers:
            self._servers.remove(supervised)
            supervised.stop()
            self._say(f"stopped {supervised.server.spec.name}")

    def _publish(self, num_prefill: int, num_decode: int) -> None:
        state = run_state.RunState(
            pid=os.getpid(),
            run_folder=self._launch.run_folder,
            is_isolated=self._options.is_isolated,
            num_prefill=num_prefill,
            num_decode=num_decode,
        )
        run_state.write_state(self._options.grpc_port, state)

    def _take_leave(self) -> None:
        """Let what runs end, unless another signal comes; nobody loads a model again meanwhile."""
        if not self._is_open:
            return
        try:
            self._signals.allow_another()
            for item in list(self._servers):
                if item.server.spec.grpc_port == self._options.grpc_port:
                    take_leave(item.server, self._options.config, self._say)
        except StopRequested:
            self._say("stopping at once")

    def _stop_all(self) -> None:
        run_state.remove_state(self._options.grpc_port)
        stops = [threading.Thread(target=item.stop) for item in reversed(self._servers)]
        for stop in stops:
            stop.start()
        for stop in stops:
            stop.join()
        remove_arenas(self._options.config)


def make_run_folder() -> Path:
    """A fresh folder for one run: configuration, registry, logs; folders of runs long dead go."""
    oldest_s = time.time() - _KEEP_LOGS_S
    for folder in run_state.user_folder().glob(f"{_RUN_PREFIX}*"):
        if folder.stat().st_mtime < oldest_s and not psutil.pid_exists(_owner_of(folder)):
            remove_run_folder(folder)
    folder = Path(tempfile.mkdtemp(prefix=_RUN_PREFIX, dir=run_state.user_folder()))
    (folder / _OWNER).write_text(str(os.getpid()))
    return folder


def _owner_of(folder: Path) -> int:
    try:
        return int((folder / _OWNER).read_text())
    except (OSError, ValueError):
        return 0


def remove_run_folder(folder: Path) -> None:
    """Remove it once nothing in it is of use any more."""
    shutil.rmtree(folder, ignore_errors=True)
