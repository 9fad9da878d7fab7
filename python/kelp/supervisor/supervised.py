"""One server of `kelp serve` under supervision: itself restarted when it dies, its models when their processes do.

Whatever takes long happens in a thread of the server's own, so that no server waits for another one's worker. Only
processes are started by the caller's thread: they end with the thread that started them.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import psutil

from kelp.core.config_supervision import SupervisionConfig
from kelp.core.errors import KelpError
from kelp.core.schema import LLM
from kelp.supervisor.backoff import Backoff
from kelp.supervisor.dead_router import free_streams
from kelp.supervisor.model_watch import ModelWatch
from kelp.supervisor.server import TritonServer
from kelp.supervisor.stop_signals import StopSignals

Say = Callable[[str], None]
_log = logging.getLogger(__name__)


class Supervised:
    """A server with its restart history; methods belong to one thread, `stop` to any."""

    def __init__(self, server: TritonServer, rules: SupervisionConfig, say: Say) -> None:
        self.server = server
        self._rules = rules
        self._say = say
        self._backoff = Backoff(rules, time.monotonic())
        self._models: ModelWatch | None = None
        self._own_thread = ThreadPoolExecutor(1, thread_name_prefix=f"watch-{server.spec.name}")
        self._task: Future[None] | None = None
        self._is_stopping = False

    def watch(self, timeout_s: float, signals: StopSignals) -> None:
        """Begin what is to be done about what died; the wait before it doubles with each early death."""
        if self._task is not None and not self._task.done():
            return
        if self.server.is_running():
            if self._rules.enabled:
                self._begin(self._watch_models)
            return
        now_s = time.monotonic()
        if not self._backoff.is_waiting:
            wait_s = self._backoff.died(now_s)
            self._say(f"{self.server.spec.name} died; restarting in {wait_s:.0f} s (log: {self.server.log_path})")
        if self._backoff.is_due(now_s):
            self._restart(timeout_s, signals)

    def stop(self) -> None:
        """Stop the server, and leave its models alone."""
        self._is_stopping = True
        self.server.stop()
        self._own_thread.shutdown(wait=True, cancel_futures=True)
        self._forget_models()

    def _begin(self, action: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                action()
            except Exception:
                _log.exception("the supervision of %s has failed; it goes on", self.server.spec.name)

        self._task = self._own_thread.submit(guarded)

    def _restart(self, timeout_s: float, signals: StopSignals) -> None:
        self._backoff.started(time.monotonic())
        with signals.held():
            is_started = self._start_anew()
        if is_started:
            self._begin(lambda: self._wait_ready(timeout_s))

    def _start_anew(self) -> bool:
        """False where the system has no process or file left for it: the others serve, and it is tried again later."""
        try:
            self.server.stop()
            self.server.start()
        except (OSError, subprocess.SubprocessError) as error:
            self._say(f"{self.server.spec.name} cannot be started: {error}")
            return False
        return True

    def _wait_ready(self, timeout_s: float) -> None:
        self._forget_models()
        try:
            self.server.wait_ready(timeout_s)
        except KelpError as error:
            if not self._is_stopping:
                self._say(f"{self.server.spec.name} did not come back: {error}")
                self.server.stop()
        else:
            self._say(f"{self.server.spec.name} is back")

    def _watch_models(self) -> None:
        if self._models is None:
            endpoint = self.server.spec.grpc_endpoint
            process = psutil.Process(self.server.pid)
            self._models = ModelWatch(process, endpoint, self._rules, self._say, self._ended_with)
        self._models.check()

    def _ended_with(self, name: str) -> bool:
        """End a server that is of no use without a dead model."""
        if name != LLM.name or not self.server.spec.ends_with_router:
            return free_streams(name, psutil.Process(self.server.pid), self._say)
        self._say(f"{name} died, and its streams would wait for ever: ending its server")
        self.server.kill()
        return True

    def _forget_models(self) -> None:
        if self._models is not None:
            self._models.close()
            self._models = None
