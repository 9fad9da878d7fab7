"""The end of a public server, first half: no new requests, and what runs may end.

`llm` is unloaded through Triton's repository API: Triton refuses what comes from then on, and ends the model's process
once its last request has been answered. It stops nothing and knows no signals: whoever calls it stops the servers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil

from kelp.client.grpc import TritonControl
from kelp.core.config import KelpConfig
from kelp.core.errors import KelpError
from kelp.core.peer_auth import load_token
from kelp.core.schema import LLM
from kelp.registry.access import open_registry
from kelp.registry.base import WorkerRecord
from kelp.supervisor.connections import has_clients
from kelp.supervisor.server import TritonServer
from kelp.supervisor.stubs import live_stubs

_POLL_S = 0.05
_QUIET_HEARTBEATS = 4.0


class Control(Protocol):
    """What is asked of the server; see `client.grpc.TritonControl`."""

    def states(self) -> dict[str, str]:
        """Each model's state; raises KelpError if the server is gone."""

    def unload(self, name: str) -> None:
        """Ask for a model to be unloaded; raises KelpError if the server is gone."""


@dataclass(frozen=True, slots=True)
class FarewellParts:
    """What a farewell is made of.

    Attributes:
        has_router: Whether a process of `llm` lives in the server.
        has_clients: Whether anybody is connected to the server: whoever has gone waits for nothing.
        workers: What the registry says of all workers; OSError or KelpError if it cannot be read.
        monotonic_s: What time it is.
        sleep: Lets so many seconds pass.
    """

    control: Control
    has_router: Callable[[], bool]
    has_clients: Callable[[], bool]
    workers: Callable[[], Sequence[WorkerRecord]]
    monotonic_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Farewell:
    """Of one server."""

    def __init__(self, parts: FarewellParts, heartbeat_s: float) -> None:
        self._parts = parts
        self._quiet_s = _QUIET_HEARTBEATS * heartbeat_s
        self._idle_since_s: float | None = None
        self._renewed_ns: dict[str, int] = {}

    def wait(self, grace_s: float, on_busy: Callable[[], None]) -> bool:
        """Take `llm` out, and wait until nothing runs any more.

        Args:
            grace_s: How long at most.
            on_busy: Called once, if something runs.

        Returns:
            False: Something may still run. A server that is gone has nothing that runs.
        """
        parts = self._parts
        started_s = parts.monotonic_s()
        has_told = False
        with contextlib.suppress(KelpError):
            while not self._has_ended():
                if parts.monotonic_s() - started_s >= grace_s:
                    return False
                if not has_told and self._idle_since_s is None:
                    has_told = True
                    on_busy()
                parts.sleep(_POLL_S)
        return True

    def _has_ended(self) -> bool:
        parts = self._parts
        is_quiet = self._is_quiet()
        # Whoever was loading it when the stop was asked for may have succeeded since.
        if parts.control.states().get(LLM.name, "").startswith("READY"):
            parts.control.unload(LLM.name)
        return is_quiet or not (parts.has_clients() and parts.has_router())

    def _is_quiet(self) -> bool:
        """Whether no worker anywhere has had anything to do for a while.

        A client that cancels a stream which has just ended leaves Triton (2.51) with a reference to the model, and its
        process there for ever.
        """
        now_s = self._parts.monotonic_s()
        renewed_ns = self._idle_workers()
        if not renewed_ns or (self._renewed_ns and renewed_ns.keys() != self._renewed_ns.keys()):
            self._idle_since_s, self._renewed_ns = None, {}
            return False
        if self._idle_since_s is None:
            self._idle_since_s, self._renewed_ns = now_s, renewed_ns
        is_fresh = all(renewed_ns[worker] > since_ns for worker, since_ns in self._renewed_ns.items())
        return is_fresh and now_s - self._idle_since_s >= self._quiet_s

    def _idle_workers(self) -> dict[str, int]:
        """When each worker renewed its record; empty where one has something to do, or nothing is known."""
        try:
            records = self._parts.workers()
        except (OSError, KelpError):
            return {}
        if any(record.num_running or record.num_waiting for record in records):
            return {}
        return {record.worker_id: record.heartbeat_ns for record in records}


def take_leave(server: TritonServer, config: KelpConfig, say: Callable[[str], None]) -> None:
    """Let what runs in a public server end, for `drain.grace_s` at most; returns as soon as nothing runs."""
    grace_s = config.drain.grace_s
    if not grace_s or not server.is_running():
        return
    process = psutil.Process(server.pid)
    if not has_clients(process):
        return
    waiting = f"no new requests; those that run have {grace_s:.0f} s (drain.grace_s), another signal stops at once"
    with contextlib.suppress(KelpError), contextlib.closing(TritonControl(server.spec.grpc_endpoint)) as control:
        parts = FarewellParts(
            control,
            has_router=lambda: any(name.startswith(f"{LLM.name}_") for name in live_stubs(process)),
            has_clients=lambda: has_clients(process),
            workers=open_registry(config.registry, load_token(config.peers)).workers.snapshot,
        )
        if not Farewell(parts, config.registry.heartbeat_s).wait(grace_s, lambda: say(waiting)):
            say(f"after {grace_s:.0f} s requests still run; they end with errors")
