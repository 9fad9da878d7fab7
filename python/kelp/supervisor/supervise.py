"""`kelp supervise`: looks after the models of a tritonserver that somebody else starts and stops.

It may be killed and started again at any moment: the server does not notice, and the next one finds what it needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn

from kelp.core.config_supervision import SupervisionConfig
from kelp.supervisor.dead_router import free_streams
from kelp.supervisor.model_watch import ModelWatch
from kelp.supervisor.stop_signals import StopRequested, StopSignals
from kelp.supervisor.stubs import find_server, is_live

_WATCH_S = 0.5
Say = Callable[[str], None]


class Supervision:
    """The server of one gRPC port, one incarnation after the other.

    Args:
        endpoint: `host:port` of its gRPC service, on this host.
    """

    def __init__(self, endpoint: str, rules: SupervisionConfig, say: Say) -> None:
        self._endpoint = endpoint
        self._port = int(endpoint.rpartition(":")[2])
        self._rules = rules
        self._say = say
        self._watch: ModelWatch | None = None
        self._is_missed = False

    def run(self) -> None:
        """Supervise until SIGTERM or SIGINT; the server serves on.

        Raises:
            ConfigError: Several servers have that port.
        """
        StopSignals().install()
        try:
            self._supervise()
        except StopRequested:
            self._say("stopping; the server serves on")

    def step(self) -> None:
        """Look once; blocks while a model is being loaded."""
        if self._watch is not None and not is_live(self._watch.server):
            self._say(f"the tritonserver at gRPC port {self._port} has ended (pid {self._watch.server.pid})")
            self._watch.close()
            self._watch = None
        if self._watch is None:
            self._find()
        if self._watch is not None:
            self._watch.check()

    def _supervise(self) -> NoReturn:
        while True:
            self.step()
            time.sleep(_WATCH_S)

    def _find(self) -> None:
        server = find_server(self._port)
        if server is None:
            if not self._is_missed:
                self._say(f"no tritonserver with gRPC port {self._port} on this host; waiting for one")
            self._is_missed = True
            return
        self._is_missed = False
        self._say(f"found the tritonserver at gRPC port {self._port} (pid {server.pid})")
        self._watch = ModelWatch(
            server, self._endpoint, self._rules, self._say, lambda name: free_streams(name, server, self._say)
        )
