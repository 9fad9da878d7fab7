"""Workers by the shortest way: their own socket where they have one that can be reached, else through Triton."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kelp.client.base import Receive, WorkerAddress, WorkerClient, WorkerStream
from kelp.client.direct.connection import DirectConnection
from kelp.client.direct.dialling import Dialling
from kelp.core.messages import DrainCommand, GenerateCommand, StatusCommand, WorkerStatus


class ShortestWay:
    """See `client.base.WorkerClient`.

    Args:
        direct: Connections to workers' own sockets.
        triton: Serves workers without one, and the others while it cannot be reached.
    """

    def __init__(self, direct: Dialling, triton: WorkerClient) -> None:
        self._direct = direct
        self._triton = triton

    def generate(
        self, address: WorkerAddress, command: GenerateCommand, prompt: npt.NDArray[np.int32], receive: Receive
    ) -> WorkerStream:
        """See `WorkerClient`."""
        connection = self._connection(address)
        if connection is None:
            return self._triton.generate(address, command, prompt, receive)
        return connection.start(command, prompt, receive)

    async def control(self, address: WorkerAddress, command: DrainCommand | None) -> WorkerStatus:
        """See `WorkerClient`."""
        connection = self._connection(address)
        if connection is None:
            return await self._triton.control(address, command)
        return await connection.control(command or StatusCommand())

    def expect(self, addresses: Iterable[WorkerAddress]) -> None:
        """See `WorkerClient`."""
        for address in addresses:
            if address.direct_endpoint:
                self._direct.prepare(address)

    def has_gone(self, address: WorkerAddress) -> bool:
        """See `WorkerClient`."""
        return self._direct.has_gone(address)

    async def close(self) -> None:
        """See `WorkerClient`."""
        await self._direct.close()
        await self._triton.close()

    def _connection(self, address: WorkerAddress) -> DirectConnection | None:
        return self._direct.connection(address) if address.direct_endpoint else None
