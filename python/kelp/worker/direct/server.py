"""Where routers reach a worker past Triton: a listening socket on the worker's own loop."""

from __future__ import annotations

import asyncio

from kelp.client.direct.sockets import format_endpoint
from kelp.core.errors import ConfigError
from kelp.worker.direct.connection import DirectParts, RouterConnection

_MAX_CONNECTIONS = 256
_STOP_TIMEOUT_S = 2.0


class DirectServer:
    """All direct channels of one worker; belongs to one event loop."""

    def __init__(self, parts: DirectParts) -> None:
        self._parts = parts
        self._server: asyncio.Server | None = None
        self._connections: set[RouterConnection] = set()
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
        return format_endpoint(bare, self._server.sockets[0].getsockname()[1])

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
        is_refused = len(self._connections) >= _MAX_CONNECTIONS
        connection = RouterConnection(self._parts, is_refused, self._forget)
        self._connections.add(connection)
        self._all_lost.clear()
        return connection

    def _forget(self, connection: RouterConnection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._all_lost.set()
