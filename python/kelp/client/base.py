"""What a router needs of a connection to workers.

A worker is addressed by the gRPC endpoint of its tritonserver and its model name; whether that is this server or
another host's makes no difference.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kelp.core.messages import DrainCommand, GenerateCommand, WorkerEvent, WorkerStatus


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a worker listens."""

    endpoint: str
    model_name: str


@dataclass(frozen=True, slots=True)
class WorkerOutput:
    """One response of a worker: new tokens (none on a keep-alive) and what it tells about the request."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    event: WorkerEvent | None


class WorkerStream(Protocol):
    """Responses of one request.

    Leave it through `close` only: an upstream stream that is neither drained nor cancelled blocks the server's
    shutdown.
    """

    def __aiter__(self) -> AsyncIterator[WorkerOutput]:
        """Outputs in order.

        Raises:
            KelpError: The worker's typed error, or WorkerLost when the connection broke.
        """

    async def close(self) -> None:
        """Cancel what still runs and drain; idempotent."""


class WorkerClient(Protocol):
    """Connections to all workers; belongs to one event loop."""

    def generate(self, address: WorkerAddress, command: GenerateCommand, prompt: npt.NDArray[np.int32]) -> WorkerStream:
        """Start a request; `prompt` is `[num_tokens] int32`."""

    async def control(self, address: WorkerAddress, command: DrainCommand | None) -> WorkerStatus:
        """Drain a worker, or with None ask for its status."""

    async def close(self) -> None:
        """Close all connections."""
