"""The connections a router has to workers' own sockets: made behind the requests' backs, one per incarnation.

A request never waits for a connection: while there is none it goes another way. A worker that cannot be reached is left
in peace for a moment. One that had been reached, and whose host says that nobody listens there any more, is gone.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from kelp.client.base import WorkerAddress
from kelp.client.direct.connection import DirectConnection
from kelp.client.direct.sockets import parse_endpoint
from kelp.core.errors import KelpError, PeerRefused, WorkerDied
from kelp.core.peer_auth import PeerToken

_log = logging.getLogger(__name__)
_DIAL_TIMEOUT_S = 3.0
_REST_S = 2.0
_GONE_S = 30.0
_MAX_REACHED = 4096


class Dialling:
    """Belongs to one event loop.

    Args:
        token: What it and workers show each other; None: nothing.
    """

    def __init__(self, token: PeerToken | None = None) -> None:
        self._token = token
        self._connections: dict[WorkerAddress, DirectConnection] = {}
        self._tasks: dict[WorkerAddress, asyncio.Task[None]] = {}
        self._reached: dict[WorkerAddress, None] = {}
        self._resting: dict[WorkerAddress, asyncio.TimerHandle] = {}
        self._gone: dict[WorkerAddress, asyncio.TimerHandle] = {}

    def connection(self, address: WorkerAddress) -> DirectConnection | None:
        """A connection on which requests may start; None while there is none.

        Raises:
            WorkerDied: This incarnation has gone.
        """
        connection = self._connections.get(address)
        if connection is not None:
            return connection
        if self.has_gone(address):
            raise WorkerDied(f"worker {address.worker_id} no longer listens at {address.direct_endpoint}")
        self.prepare(address)
        return None

    def prepare(self, address: WorkerAddress) -> None:
        """Make a connection in the background, if there is none and one may come about."""
        known = (self._connections, self._tasks, self._resting, self._gone)
        if not any(address in those for those in known):
            self._dial(address)

    def has_gone(self, address: WorkerAddress) -> bool:
        """Whether it had been reached, and nobody listens there any more."""
        return address in self._gone

    async def close(self) -> None:
        """End all connections; what is open on them fails with WorkerLost."""
        tasks, self._tasks = self._tasks, {}
        for task in tasks.values():
            task.cancel()
        if tasks:
            await asyncio.wait(tasks.values())
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            connection.close()
        # Their sockets are closed in the loop's next round, which may be the last one.
        await asyncio.sleep(0)
        for timer in (*self._resting.values(), *self._gone.values()):
            timer.cancel()
        self._resting.clear()
        self._gone.clear()

    def _dial(self, address: WorkerAddress) -> None:
        self._tasks[address] = asyncio.ensure_future(self._connect(address))

    async def _connect(self, address: WorkerAddress) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._connections[address] = await asyncio.wait_for(self._welcomed(address), _DIAL_TIMEOUT_S)
        except (OSError, KelpError, asyncio.TimeoutError) as error:
            level = logging.WARNING if isinstance(error, PeerRefused) else logging.INFO
            _log.log(level, "no direct channel to worker %s: %s: %s", address.worker_id, type(error).__name__, error)
            if address in self._reached and isinstance(error, ConnectionRefusedError):
                del self._reached[address]
                self._gone[address] = loop.call_later(_GONE_S, self._gone.pop, address)
            else:
                self._resting[address] = loop.call_later(_REST_S, self._resting.pop, address)
        else:
            self._note_reached(address)
        finally:
            self._tasks.pop(address, None)

    def _note_reached(self, address: WorkerAddress) -> None:
        self._reached[address] = None
        if len(self._reached) > _MAX_REACHED:
            del self._reached[next(iter(self._reached))]

    async def _welcomed(self, address: WorkerAddress) -> DirectConnection:
        host, port = parse_endpoint(address.direct_endpoint)
        connection = DirectConnection(address, partial(self._lost, address), self._token)
        await asyncio.get_running_loop().create_connection(lambda: connection, host, port)
        try:
            await connection.welcomed
        except BaseException:
            connection.close()
            raise
        return connection

    def _lost(self, address: WorkerAddress) -> None:
        if self._connections.pop(address, None) is not None and address not in self._tasks:
            self._dial(address)
