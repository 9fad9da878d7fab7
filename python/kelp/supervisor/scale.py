"""`kelp scale` and `kelp drain`: more or fewer workers on a live server, without losing a request."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kelp.client.base import WorkerAddress
from kelp.client.grpc import GrpcWorkerClient, TritonControl
from kelp.core.config import KelpConfig, load_config
from kelp.core.errors import ConfigError, NotFound, WorkerLost
from kelp.core.messages import DrainCommand, WorkerStatus
from kelp.core.peer_auth import PeerToken, load_token
from kelp.core.types import WorkerState
from kelp.registry.access import RegistryAccess, open_registry
from kelp.registry.base import WorkerRecord
from kelp.supervisor import run_state
from kelp.supervisor.plan import WorkerSpec, worker_model_config, worker_names
from kelp.supervisor.traffic import Traffic

_POLL_S = 0.1
_START_TIMEOUT_S = 180.0
_ANSWER_MARGIN_S = 10.0
"""What a worker may take to say how its drain went, beyond the time that it has for it."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class VersionBeside:
    """A version of the model beside the server's own.

    Attributes:
        model_folder: Where it lies; None if no worker of it is to be started.
    """

    version: str
    model_folder: Path | None

    def settings(self) -> dict[str, str]:
        """What its workers are told.

        Raises:
            ConfigError: Nobody said where it lies.
        """
        if self.model_folder is None:
            raise ConfigError(f"--version {self.version}: where does it lie? --model FOLDER says so")
        return {"model.path": str(self.model_folder), "model.version": self.version}


class Fleet:
    """The workers behind one public server, however it was started."""

    def __init__(self, endpoint: str, say: Say) -> None:
        self._control = TritonControl(endpoint)
        self._port = int(endpoint.rpartition(":")[2])
        self._run = run_state.read_state(self._port)
        self._say = say
        self._registry: RegistryAccess | None = None

    def close(self) -> None:
        """Close the connection."""
        self._control.close()

    def workers(self, role: str, version: str = "") -> list[WorkerSpec]:
        """Workers of a role that run now, in order of their numbers; `version`: of another one than the server's."""
        pattern = re.compile(rf"{role}_{version}(?:_(\d+))?" if version else rf"{role}(?:_(\d+))?")
        found = [
            (int(match.group(1) or 0), record.model_name)
            for record in self._records()
            if (match := pattern.fullmatch(record.model_name))
        ]
        return [WorkerSpec(name, role, version) for _, name in sorted(found)]

    def scale(self, role: str, count: int, drain_timeout_s: float, beside: VersionBeside | None = None) -> None:
        """Start or stop workers until there are `count`; with `beside`, of that version.

        Raises:
            ConfigError: A worker did not come up, or `count` makes no sense.
        """
        self._check(role, count, beside)
        version = "" if beside is None else beside.version
        running = self.workers(role, version)
        wanted = worker_names(role, count, version)
        added = [worker for worker in wanted if worker not in running]
        removed = [worker for worker in running if worker not in wanted]
        settings = beside.settings() if beside is not None and added else {}
        for worker in reversed(removed):
            self._say(f"draining {worker.name}")
            self.drain(worker.name, drain_timeout_s)
        if self._run is not None and self._run.is_isolated:
            self._tell_supervisor(role, count)
        else:
            self._load_and_unload(added, removed, settings)
        for worker in removed:
            self._wait_for(partial(self._is_gone, worker.name), f"{worker.name} to be gone")
            self._say(f"{worker.name} is gone")
        for worker in added:
            self._wait_for(partial(self._is_ready, worker.name), f"{worker.name} to register")
            self._say(f"{worker.name} serves")

    def drain(self, name: str, timeout_s: float) -> WorkerStatus:
        """Stop routing to a worker and wait until its requests have ended.

        Raises:
            NotFound: There is no such worker.
            WorkerLost: It does not answer.
        """
        record = self._record(name)
        if record is None:
            raise NotFound(f"worker {name!r}: not registered; running: {', '.join(self._names()) or 'none'}")
        address = WorkerAddress(record.endpoint, record.model_name, epoch=record.epoch)
        return asyncio.run(_drain(address, load_token(self._config().peers), timeout_s))

    def _check(self, role: str, count: int, beside: VersionBeside | None) -> None:
        if role == "decode" and count < 1 and beside is None:
            raise ConfigError("decode: at least 1 worker is needed, got 0")
        if beside is None:
            return
        if self._run is not None and self._run.is_isolated:
            raise ConfigError(
                "--version: kelp serve --isolate runs one version; start a tritonserver of the other one with the "
                "same registry"
            )
        own = self._config().model.version
        if beside.version == own:
            raise ConfigError(f"--version {own}: is the server's own; without --version that is scaled")
        share = Traffic(self._access(), own).shares().get(beside.version, 0.0)
        if role == "decode" and count < 1 and share:
            raise ConfigError(f"decode: version {beside.version} has a share of {share:g}; `kelp traffic` first")

    def _load_and_unload(self, added: list[WorkerSpec], removed: list[WorkerSpec], settings: Mapping[str, str]) -> None:
        for worker in removed:
            self._control.unload(worker.name)
        for worker in added:
            self._say(f"loading {worker.name}")
            config = None if worker.is_on_disk else worker_model_config(worker, settings)
            self._control.load(worker.name, config)

    def _tell_supervisor(self, role: str, count: int) -> None:
        assert self._run is not None
        num_prefill = count if role == "prefill" else self._run.num_prefill
        num_decode = count if role == "decode" else self._run.num_decode
        wanted = run_state.WantedWorkers(num_prefill=num_prefill, num_decode=num_decode)
        run_state.write_wanted(self._run.run_folder, wanted)
        folder = self._run.run_folder
        self._wait_for(lambda: run_state.read_wanted(folder) is None, "kelp serve to take notice")
        now = run_state.read_state(self._port)
        if now is None or (now.num_prefill, now.num_decode) != (num_prefill, num_decode):
            raise ConfigError(f"{role}={count}: kelp serve did not get there; its output and logs say why")

    def _wait_for(self, is_done: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not is_done():
            if time.monotonic() > deadline_s:
                raise ConfigError(f"waited {_START_TIMEOUT_S:.0f} s in vain for {what}")
            time.sleep(_POLL_S)

    def _is_gone(self, name: str) -> bool:
        return self._record(name) is None

    def _is_ready(self, name: str) -> bool:
        record = self._record(name)
        return record is not None and record.state is WorkerState.READY

    def _record(self, name: str) -> WorkerRecord | None:
        return next((record for record in self._records() if record.model_name == name), None)

    def _names(self) -> list[str]:
        return [record.model_name for record in self._records()]

    def _records(self) -> list[WorkerRecord]:
        try:
            records = self._access().workers.snapshot()
        except OSError as error:
            raise ConfigError(f"registry unreachable: {error}") from None
        if self._run is not None:
            return [record for record in records if record.endpoint.startswith(f"{self._config().server.host}:")]
        return [record for record in records if record.endpoint.endswith(f":{self._port}")]

    def _access(self) -> RegistryAccess:
        if self._registry is None:
            config = self._config()
            self._registry = open_registry(config.registry, load_token(config.peers))
        return self._registry

    def _config(self) -> KelpConfig:
        return load_config(path=None if self._run is None else self._run.run_folder / "kelp.yaml")


async def _drain(address: WorkerAddress, token: PeerToken | None, timeout_s: float) -> WorkerStatus:
    client = GrpcWorkerClient(token)
    try:
        return await asyncio.wait_for(
            client.control(address, DrainCommand(timeout_s=timeout_s)), timeout_s + _ANSWER_MARGIN_S
        )
    except asyncio.TimeoutError:
        # Triton leaves what a dead process was asked without an answer, and calls its model ready.
        raise WorkerLost(
            f"worker {address.model_name}: no answer within {timeout_s + _ANSWER_MARGIN_S:.0f} s, "
            "its process has died or hangs"
        ) from None
    finally:
        await client.close()
