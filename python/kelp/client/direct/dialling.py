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
from kelp.core.errors import KelpError, WorkerLost

_log = logging.getLogger(__name__)
_DIAL_TIMEOUT_S = 3.0
_REST_S = 2.0
_GONE_S = 30.0


class Dialling:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._connections: dict[WorkerAddress, DirectConnection] = {}
        self._tasks: dict[WorkerAddress, asyncio.Task[None]] = {}
        self._resting: dict[WorkerAddress, asyncio.TimerHandle] = {}
        self._gone: dict[WorkerAddress, asyncio.TimerHandle] = {}

    def connection(self, address: WorkerAddress) -> DirectConnection | None:
        """A connection on which requests may start; None while there is none.

        Raises:
            WorkerLost: This incarnation has gone.
        """
        connection = self._connections.get(address)
        if connection is not None:
            return connection
        if address in self._gone:
            raise WorkerLost(f"worker {address.worker_id} no longer listens at {address.direct_endpoint}")
        if address not in self._tasks and address not in self._resting:
            self._dial(address, was_connected=False)
        return None

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

    def _dial(self, address: WorkerAddress, was_connected: bool) -> None:
        self._tasks[address] = asyncio.ensure_future(self._connect(address, was_connected))

    async def _connect(self, address: WorkerAddress, was_connected: bool) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._connections[address] = await asyncio.wait_for(self._welcomed(address), _DIAL_TIMEOUT_S)
        except (OSError, KelpError, asyncio.TimeoutError) as error:
            _log.info("no direct channel to worker %s: %s: %s", address.worker_id, type(error).__name__, error)
            if was_connected and isinstance(error, ConnectionRefusedError):
                self._gone[address] = loop.call_later(_GONE_S, self._gone.pop, address)
            else:
                self._resting[address] = loop.call_later(_REST_S, self._resting.pop, address)
        finally:
            self._tasks.pop(address, None)

    async def _welcomed(self, address: WorkerAddress) -> DirectConnection:
        host, port = parse_endpoint(address.direct_endpoint)
        connection = DirectConnection(address, partial(self._lost, address))
        await asyncio.get_running_loop().create_connection(lambda: connection, host, port)
        try:
            await connection.welcomed
        except BaseException:
            connection.close()
            raise
        return connection

    def _lost(self, address: WorkerAddress) -> None:
        if self._connections.pop(address, None) is not None and address not in self._tasks:
            self._dial(address, was_connected=True)
