"""One tritonserver process: start, wait until it serves, stop, and leave nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from kelp.client.grpc import TritonControl
from kelp.core.errors import ConfigError, KelpError
from kelp.core.schema import LLM
from kelp.supervisor import shm
from kelp.supervisor.plan import ServerSpec, router_model_config, worker_model_config

_BACKENDS = ("python", "kelp_router", "kelp_preprocess", "kelp_prefill", "kelp_decode", "kelp_kv_block_manager")
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.1
_LOADS_AT_ONCE = 4
"""As many as Triton's own threads for it (`--model-load-thread-count`)."""
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl
"""Looked up here: a child of a process with threads may find the loader's lock held, for ever."""
_LOG_TAIL_LINES = 8


@dataclass(frozen=True, slots=True)
class Launch:
    """Where a tritonserver comes from and where it finds its files."""

    binary: Path
    environment: Mapping[str, str]
    model_repository: Path
    backends: Path
    run_folder: Path


def command_line(launch: Launch, spec: ServerSpec) -> list[str]:
    """The design's serving command plus addresses, ports and shared-memory prefix."""
    command = [
        str(launch.binary),
        f"--model-repository={launch.model_repository}",
        f"--backend-directory={launch.backends}",
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in spec.on_disk_models),
        "--strict-readiness=false",
        f"--grpc-address={spec.host}",
        f"--grpc-port={spec.grpc_port}",
        f"--metrics-address={spec.host}",
        f"--metrics-port={spec.metrics_port}",
        "--exit-timeout-secs=10",
    ]
    if spec.http_port is None:
        command.append("--allow-http=false")
    else:
        command += [f"--http-address={spec.host}", f"--http-port={spec.http_port}"]
    for backend in _BACKENDS:
        command.append(f"--backend-config={backend},shm-region-prefix-name={shm_prefix(spec)}")
        command.append(f"--backend-config={backend},shm-default-byte-size={shm.BYTES_PER_MODEL}")
    return command


def shm_prefix(spec: ServerSpec) -> str:
    """Prefix of the server's shared-memory regions: one per gRPC port, so that leftovers are known as such."""
    return f"kelp_{os.getuid()}_{spec.grpc_port}_"


class TritonServer:
    """A supervised tritonserver; all methods block."""

    def __init__(self, launch: Launch, spec: ServerSpec) -> None:
        self._launch = launch
        self.spec = spec
        self.log_path = launch.run_folder / f"{spec.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; its output goes to the log file."""
        shm.sweep(shm_prefix(self.spec))
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command_line(self._launch, self.spec),
                env=dict(self._launch.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    @property
    def pid(self) -> int:
        """Of the latest process."""
        assert self._process is not None
        return self._process.pid

    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End the process at once, and with it every connection; `stop` cleans up."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until all models serve, adding the ones that are not on disk.

        Raises:
            ConfigError: The server died, a model failed to load, or it took too long; quotes the reason.
        """
        deadline_s = time.monotonic() + timeout_s
        with contextlib.closing(TritonControl(self.spec.grpc_endpoint)) as control:
            self._wait_for(control.is_live, "an answer", deadline_s)
            for name in self.spec.on_disk_models:
                self._wait_model(control, name, deadline_s)
            self._add_workers(control, deadline_s)
            if self.spec.router_instances > 1:
                control.load(LLM.name, router_model_config(self.spec.router_instances))
                self._wait_model(control, LLM.name, deadline_s)

    def stop(self) -> None:
        """Stop server and stubs, by force if they do not go, and free their shared memory."""
        if self._process is None:
            return
        family = self._family()
        if self.is_running():
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=5.0)
        self._process.wait()
        shm.sweep(shm_prefix(self.spec))

    def _family(self) -> list[psutil.Process]:
        """Server and stubs, also stubs whose server has died before them."""
        assert self._process is not None
        family = stubs_of(shm_prefix(self.spec))
        with contextlib.suppress(psutil.NoSuchProcess):
            server = psutil.Process(self._process.pid)
            family += [server, *server.children(recursive=True)]
        return family

    def _add_workers(self, control: TritonControl, deadline_s: float) -> None:
        pool = ThreadPoolExecutor(_LOADS_AT_ONCE, thread_name_prefix="kelp-load")
        try:
            workers = self.spec.added_workers
            loads = [pool.submit(control.load, worker.name, worker_model_config(worker)) for worker in workers]
            for worker, load in zip(workers, loads, strict=True):
                load.result()
                self._wait_model(control, worker.name, deadline_s)
        finally:
            # Without waiting: whoever interrupts this stops the server, which ends the loads.
            pool.shutdown(wait=False, cancel_futures=True)

    def _wait_model(self, control: TritonControl, name: str, deadline_s: float) -> None:
        def is_ready() -> bool:
            if "UNAVAILABLE" in (state := self._state(control, name)) and ":" in state:
                raise ConfigError(f"model {name} did not load: {_first_line(state)}; log: {self.log_path}")
            return control.is_model_ready(name)

        self._wait_for(is_ready, f"model {name}", deadline_s)

    def _wait_for(self, is_done: Callable[[], bool], what: str, deadline_s: float) -> None:
        while not is_done():
            if not self.is_running():
                raise ConfigError(f"tritonserver ended while waiting for {what}: {self._last_words()}")
            if time.monotonic() > deadline_s:
                raise ConfigError(f"tritonserver took too long: waited for {what}; log: {self.log_path}")
            time.sleep(_POLL_S)

    def _state(self, control: TritonControl, name: str) -> str:
        with contextlib.suppress(KelpError):
            return control.states().get(name, "")
        return ""

    def _last_words(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "KELP_" in line or line.startswith("E") or "error" in line.lower()]
        return f"{(errors or lines or ['no output'])[-1][:500]} (log: {self.log_path})"


def _end_with_parent() -> None:
    """In the child: SIGTERM when the supervisor dies without having said goodbye (Linux, prctl(2))."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _first_line(text: str) -> str:
    found = [line for line in text.splitlines() if "[KELP_" in line]
    return (found or text.splitlines())[0].strip()[:500]


def stubs_of(prefix: str) -> list[psutil.Process]:
    """A server's stubs, recognised by the shared-memory prefix on their command line."""
    stubs = []
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        if any("triton_python_backend_stub" in argument for argument in arguments[:1]) and any(
            prefix in argument for argument in arguments
        ):
            stubs.append(process)
    return stubs
