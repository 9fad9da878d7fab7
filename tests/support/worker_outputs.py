"""A request on a worker, read item by item: what a test finds handier than being called back."""

from __future__ import annotations

import asyncio

import numpy as np
import numpy.typing as npt

from kelp.client.base import WorkerAddress, WorkerClient, WorkerOutput
from kelp.core.errors import KelpError
from kelp.core.messages import GenerateCommand


class WorkerRequest:
    """Starts the request; iterate for its outputs, which end as the worker's do."""

    def __init__(
        self,
        client: WorkerClient,
        address: WorkerAddress,
        command: GenerateCommand,
        prompt: npt.NDArray[np.int32],
    ) -> None:
        self._items: asyncio.Queue[WorkerOutput | KelpError | None] = asyncio.Queue()
        self.num_ends = 0
        self.stream = client.generate(address, command, prompt, self._receive)

    def __aiter__(self) -> WorkerRequest:
        return self

    async def __anext__(self) -> WorkerOutput:
        item = await self._items.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, KelpError):
            raise item
        return item

    async def close(self) -> None:
        await self.stream.close()

    def _receive(self, item: WorkerOutput | KelpError | None) -> None:
        self.num_ends += not isinstance(item, WorkerOutput)
        assert self.num_ends == (not isinstance(item, WorkerOutput)), "something came after the end"
        self._items.put_nowait(item)
