"""What is done for the clients of a router whose process has died: Triton never ends their streams.

Nor does it answer what is asked before another router is there: it keeps that past any deadline, and gives it up one by
one, a second each, when it tries the dead process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

import psutil

from kelp.client.grpc import TritonControl
from kelp.core.schema import LLM
from kelp.supervisor.connections import break_client_connections
from kelp.supervisor.stubs import is_live

_PERIOD_S = 1.0
Say = Callable[[str], None]


def free_streams(name: str, server: psutil.Process, say: Say) -> bool:
    """For `ModelWatch`: break the clients' connections if the model that has died is the router; always False.

    With several routers in a server the clients of the others lose theirs, too: which is whose cannot be told.
    """
    if name != LLM.name:
        return False
    try:
        count = break_client_connections(server)
    except (OSError, psutil.Error) as error:
        say(f"{name} died, and its streams may wait for ever: {error}")
    else:
        if count:
            say(f"{name} died, and its streams would wait for ever: {count} connections of clients broken")
    return False


class RouterGap:
    """While a server has no router, breaks what clients open to it, once a second: they hear soon, and ask again.

    In a thread of its own, because loading models takes the supervisor's for seconds. Other methods belong to one
    thread.

    Args:
        server: Its process.
        endpoint: `host:port` of its gRPC service.
    """

    def __init__(self, server: psutil.Process, endpoint: str, period_s: float = _PERIOD_S) -> None:
        self._server = server
        self._endpoint = endpoint
        self._period_s = period_s
        self._routers: Collection[psutil.Process] = ()
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, routers: Collection[psutil.Process]) -> None:
        """These live; without any, those that were named before have died."""
        if not routers:
            return
        with self._lock:
            self._routers = routers
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="router-gap", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """A router has been loaded: from now on no connection is broken until those that follow have died."""
        with self._lock:
            self._routers = ()

    def close(self) -> None:
        """Stop watching."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        control = TritonControl(self._endpoint)
        try:
            while not self._is_over.wait(self._period_s):
                routers = self._routers
                # Triton takes requests for a dead router, but for none that somebody has unloaded.
                if routers and not any(map(is_live, routers)) and control.is_model_ready(LLM.name):
                    self._break(routers)
        finally:
            control.close()

    def _break(self, routers: Collection[psutil.Process]) -> None:
        with self._lock:
            if self._routers is not routers:
                return
            try:
                # Not our own: a router may be being loaded over one of them.
                break_client_connections(self._server, spared=[psutil.Process()])
            except (OSError, psutil.Error):
                # Said when the router died.
                return
