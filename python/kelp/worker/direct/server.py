"""Where routers reach a worker past Triton: a listening socket on the worker's own loop."""

from __future__ import annotations

import asyncio
import logging

from kelp.client.direct.sockets import format_endpoint
from kelp.client.direct.wire import handshake_names
from kelp.core.errors import ConfigError
from kelp.core.peer_handshake import Responder
from kelp.worker.direct.connection import DirectParts, RouterConnection

_log = logging.getLogger(__name__)
_MAX_CONNECTIONS = 256
_MAX_STRANGERS = 64
"""Connections that have not been welcomed; who has waited longest goes first, because routers take milliseconds."""
_STOP_TIMEOUT_S = 2.0


class DirectServer:
    """All direct channels of one worker; belongs to one event loop."""

    def __init__(self, parts: DirectParts) -> None:
        self._parts = parts
        self._server: asyncio.Server | None = None
        self._endpoint = ""
        self._num_refused = 0
        self._connections: dict[RouterConnection, None] = {}
        self._all_lost = asyncio.Event()
        self._all_lost.set()

    @property
    def num_connections(self) -> int:
        """Routers connected."""
        return len(self._connections)

    @property
    def num_requests(self) -> int:
        """Requests under way on all connections."""
        return sum(connection.num_requests for connection in self._connections)

    @property
    def num_held(self) -> int:
        """Items that routers do not take."""
        return sum(connection.num_held for connection in self._connections)

    async def start(self, host: str) -> str:
        """Listen at a free port.

        Returns:
            The endpoint, `host:port`.

        Raises:
            ConfigError: The address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        bare = host.removeprefix("[").removesuffix("]")
        try:
            self._server = await loop.create_server(self._connection, bare, 0, reuse_address=False)
        except OSError as error:
            raise ConfigError(f"handoff.host: {host} cannot be bound: {error}") from None
        self._endpoint = format_endpoint(bare, self._server.sockets[0].getsockname()[1])
        return self._endpoint

    def stop_listening(self) -> None:
        """No further router may connect; idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def stop(self) -> None:
        """End all connections; what requests have still to say is sent, if the routers read it. Idempotent."""
        self.stop_listening()
        await asyncio.gather(*(connection.stop() for connection in self._connections))
        try:
            await asyncio.wait_for(self._all_lost.wait(), _STOP_TIMEOUT_S)
        except asyncio.TimeoutError:
            return

    def _connection(self) -> RouterConnection:
        strangers = [connection for connection in self._connections if connection.is_stranger]
        if len(strangers) >= _MAX_STRANGERS:
            strangers[0].make_room()
        connection = RouterConnection(self._parts, self._responder(), self._forget)
        connection.is_refused = sum(known.is_welcome for known in self._connections) >= _MAX_CONNECTIONS
        self._connections[connection] = None
        self._all_lost.clear()
        return connection

    def _responder(self) -> Responder | None:
        parts = self._parts
        if parts.token is None:
            return None
        names = handshake_names(parts.worker_id, parts.epoch, self._endpoint)
        return Responder(parts.token, names, "direct channel of a router")

    def _forget(self, connection: RouterConnection) -> None:
        self._connections.pop(connection, None)
        if connection.why_refused:
            self._note_refused(connection.why_refused)
        if not self._connections:
            self._all_lost.set()

    def _note_refused(self, why: str) -> None:
        """Say so now and then: whoever floods the port must not flood the log."""
        self._num_refused += 1
        if self._num_refused & (self._num_refused - 1) == 0:
            _log.warning("a router's direct channel was refused, %d so far: %s", self._num_refused, why)
