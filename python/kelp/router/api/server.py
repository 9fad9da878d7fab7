"""The process of `kelp router`: both transports over one set of operations, until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kelp.core.errors import ConfigError
from kelp.router.api.auth import Authenticator
from kelp.router.api.exposition import Exposition
from kelp.router.api.http import HttpApi
from kelp.router.api.operations import Operations
from kelp.router.api.rpc import GrpcApi

_PERIOD_S = 1.0
_log = logging.getLogger(__name__)


class Background(Protocol):
    """What keeps the decision informed: the registry's view, the event feed."""

    async def start(self) -> None:
        """Begin."""

    async def stop(self) -> None:
        """End, and let go of sockets."""


@dataclass(frozen=True, slots=True)
class ListenOptions:
    """Where to listen; port 0 takes a free one.

    Attributes:
        token: Bearer token that every caller must show; None lets everybody in.
    """

    host: str
    http_port: int
    grpc_port: int
    token: str | None


@dataclass(frozen=True, slots=True)
class Ports:
    """Where it listens."""

    http: int
    grpc: int


class RouterServer:
    """Serves the operations; everything belongs to one event loop.

    Args:
        operations: What is served.
        background: Started before and stopped after.
        exposition: The metrics.
        period_s: How often observations are gathered, and what callers have forgotten is freed.
    """

    def __init__(
        self, operations: Operations, background: Background, exposition: Exposition, period_s: float = _PERIOD_S
    ) -> None:
        self._operations = operations
        self._background = background
        self._exposition = exposition
        self._period_s = period_s

    async def run(self, options: ListenOptions, on_ready: Callable[[Ports], None], stopping: asyncio.Event) -> None:
        """Serve until `stopping` is set.

        Raises:
            ConfigError: An address cannot be bound; names the option.
        """
        auth = Authenticator(options.token)
        http = HttpApi(self._operations, auth, self._exposition.text)
        rpc = GrpcApi(self._operations, auth)
        await self._background.start()
        keeping = asyncio.ensure_future(self._keep_house())
        try:
            ports = await _listen(http, rpc, options)
            on_ready(ports)
            await stopping.wait()
        finally:
            keeping.cancel()
            await http.stop()
            await rpc.stop()
            await self._background.stop()

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            try:
                self._operations.sweep()
                self._exposition.gather()
            except Exception:
                # A supervisor's guard: whatever one request did, the next round takes the others.
                _log.exception("a round of housekeeping failed")


def stop_on_signals(stopping: asyncio.Event) -> None:
    """SIGINT and SIGTERM end the running loop's server in good order."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)


async def _listen(http: HttpApi, rpc: GrpcApi, options: ListenOptions) -> Ports:
    try:
        http_port = await http.start(options.host, options.http_port)
    except OSError as error:
        text = f"--http-port {options.http_port}: cannot listen on {options.host}: {error.strerror or error}"
        raise ConfigError(text) from None
    return Ports(http_port, await rpc.start(options.host, options.grpc_port))
