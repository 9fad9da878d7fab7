"""The models of one running tritonserver: each whose process has died is loaded again, and said so.

Triton neither restarts a Python model's process nor says that it has died. So the models that Triton calls ready are
compared with the processes that it has; the watch keeps nothing that it could not find out again, and may be killed
and replaced at any moment. It knows no records and no workers: any kelp model is treated alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil

from kelp.client.grpc import TritonControl
from kelp.core.config_supervision import SupervisionConfig
from kelp.core.errors import KelpError
from kelp.core.schema import LLM
from kelp.core.schema_types import RESTART_PARAMETER
from kelp.supervisor.backoff import Backoff
from kelp.supervisor.dead_router import RouterGap, free_streams
from kelp.supervisor.remains import Remains
from kelp.supervisor.stubs import is_live, live_stubs
from kelp.supervisor.watch_lock import WatchLock

_OWN_BACKENDS = "kelp_"
Say = Callable[[str], None]


class ModelWatch:
    """Looks after one tritonserver until that ends; belongs to one thread.

    Args:
        server: Its process, on this host.
        endpoint: `host:port` of its gRPC service.
        deal_with: Asked first about a model that has died; True: nothing else is to be done.
    """

    def __init__(
        self,
        server: psutil.Process,
        endpoint: str,
        rules: SupervisionConfig,
        say: Say,
        deal_with: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._server = server
        self._control = TritonControl(endpoint)
        self._rules = rules
        self._say = say
        self._deal_with = deal_with
        self._lock = WatchLock(int(endpoint.rpartition(":")[2]))
        self._is_standing_by = False
        self._look_at_s = 0.0
        self._stubs: dict[str, psutil.Process] = {}
        self._born_s: dict[str, float] = {}
        self._instances: dict[str, frozenset[str]] = {}
        self._suspects: frozenset[str] = frozenset()
        self._remains = Remains()
        self._gap = RouterGap(server, endpoint)
        self._backoffs: dict[str, Backoff] = {}
        self._num_restarts: dict[str, int] = {}

    @property
    def server(self) -> psutil.Process:
        """Whose models these are."""
        return self._server

    def close(self) -> None:
        """Let another watch have the server."""
        self._gap.close()
        self._lock.release()
        self._control.close()

    def check(self) -> None:
        """Look for dead models, and load at most one again; blocks for as long as that takes."""
        if not self._is_alone():
            return
        now_s = time.monotonic()
        has_lost = not all(map(is_live, self._stubs.values()))
        if has_lost or self._suspects or self._remains.are_suspect or now_s >= self._look_at_s:
            self._look(now_s)
        due = [name for name, backoff in self._backoffs.items() if backoff.is_due(now_s)]
        if due:
            self._load(due[0])

    def _is_alone(self) -> bool:
        is_alone = self._lock.acquire()
        if is_alone == self._is_standing_by:
            self._is_standing_by = not is_alone
            self._say("supervising" if is_alone else "another supervisor has this server; standing by")
        return is_alone

    def _look(self, now_s: float) -> None:
        self._look_at_s = now_s + self._rules.look_s
        try:
            living = live_stubs(self._server)
            outlived = self._remains.look(living)
            stubs = self._latest(living)
            self._gap.follow([stub for name, stub in stubs.items() if name.startswith(f"{LLM.name}_")])
            if stubs != self._stubs:
                self._stubs, self._instances = stubs, {}
            dead = {name for name in self._control.ready_models() if self._instances_of(name) - stubs.keys()}
        except KelpError:
            # The server starts or stops, or a model has just been unloaded.
            return
        # One look alone may see a model between two states.
        for name in sorted(dead & self._suspects):
            self._remains.forget(name)
            if not self._deal_with(name):
                self._note_death(name, now_s)
        for name in sorted(outlived - dead):
            self._remains.forget(name)
            free_streams(name, self._server, self._say)
        self._suspects = frozenset(name for name in dead if not self._is_waiting(name))
        for name in [name for name in self._backoffs if self._is_waiting(name) and name not in dead]:
            del self._backoffs[name]

    def _latest(self, stubs: dict[str, psutil.Process]) -> dict[str, psutil.Process]:
        """Without what is left of instances that were loaded again since: it may have requests to finish."""
        for name, stub in stubs.items():
            self._born_s[name] = max(self._born_s.get(name, 0.0), stub.create_time())
        return {name: stub for name, stub in stubs.items() if stub.create_time() >= self._born_s[name]}

    def _instances_of(self, name: str) -> frozenset[str]:
        """Processes that a model should have, by the names that Triton gives them."""
        if name not in self._instances:
            config = self._control.config_of(name)
            groups = config.get("instance_group", []) if config.get("backend", "").startswith(_OWN_BACKENDS) else []
            self._instances[name] = frozenset(
                f"{group['name']}_{index}" for group in groups for index in range(int(group.get("count", 1)))
            )
        return self._instances[name]

    def _is_waiting(self, name: str) -> bool:
        return name in self._backoffs and self._backoffs[name].is_waiting

    def _note_death(self, name: str, now_s: float) -> None:
        if name not in self._backoffs:
            self._backoffs[name] = Backoff(self._rules, now_s)
        if not self._is_waiting(name):
            self._say(f"{name} died; loading it again in {self._backoffs[name].died(now_s):.0f} s")

    def _load(self, name: str) -> None:
        started_s = time.monotonic()
        self._backoffs[name].started(started_s)
        self._look_at_s = started_s
        try:
            had_none = self._instances_of(name).isdisjoint(self._stubs)
            self._control.load(name, self._changed_config(name))
        except KelpError as error:
            self._say(f"{name} did not come back: {_reason(error)}")
            return
        took_s = time.monotonic() - started_s
        if name == LLM.name:
            self._gap.end()
        if had_none:
            # What was asked meanwhile waits for the dead process: Triton gives it up one by one, a second each.
            free_streams(name, self._server, self._say)
        # After that: whoever waits for these words, and asks then, keeps his connection.
        self._say(f"{name} is back ({took_s:.1f} s, restart {self._num_restarts[name]})")

    def _changed_config(self, name: str) -> dict[str, Any]:
        """The model's own configuration with another number of restarts: Triton loads nothing that is unchanged.

        Raises:
            KelpError: Somebody has unloaded it.
        """
        config = self._control.config_of(name)
        parameters = dict(config.get("parameters", {}))
        told = str(parameters.get(RESTART_PARAMETER, {}).get("string_value", ""))
        number = max(int(told) if told.isdecimal() else 0, self._num_restarts.get(name, 0)) + 1
        self._num_restarts[name] = number
        return {**config, "parameters": {**parameters, RESTART_PARAMETER: {"string_value": str(number)}}}


def _reason(error: KelpError) -> str:
    """What is wrong, without the traceback that Triton quotes below it."""
    return error.text.strip().partition("\n")[0][:500]
