"""What a router needs of a connection to workers.

A worker is addressed by the gRPC endpoint of its tritonserver and its model name; whether that is this server or
another host's makes no difference. A worker that also listens by itself says where (docs/decisions/0010).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kelp.core.errors import KelpError
from kelp.core.kv_manager_messages import Operation, Result
from kelp.core.messages import DrainCommand, GenerateCommand, WorkerEvent, WorkerStatus


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a worker listens.

    Attributes:
        direct_endpoint: `host:port` of its own socket; empty for workers that are reached through Triton alone.
        epoch: The incarnation that is meant; only the worker's own socket tells incarnations apart.
    """

    endpoint: str
    model_name: str
    direct_endpoint: str = ""
    epoch: str = ""

    @property
    def worker_id(self) -> str:
        """As in the registry."""
        return f"{self.endpoint}/{self.model_name}"


@dataclass(frozen=True, slots=True)
class WorkerOutput:
    """One response of a worker: new tokens (none on a keep-alive) and what it tells about the request."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    event: WorkerEvent | None


Receive = Callable[[WorkerOutput | KelpError | None], None]
"""Takes what a worker says, in order and on the event loop: outputs, and at the end, once, None or the typed error.

WorkerLost: the connection broke. Called from inside the connection's reading: it returns at once and raises nothing.
"""


class WorkerStream(Protocol):
    """One request under way.

    Leave one that has not ended through `close` only: a worker that nobody tells goes on, and a stream of Triton's that
    is neither drained nor cancelled blocks its server's shutdown.
    """

    @property
    def has_ended(self) -> bool:
        """Whether nothing of the request is left with the worker."""

    async def close(self) -> None:
        """Cancel what still runs and drain; idempotent."""


class WorkerClient(Protocol):
    """Connections to all workers; belongs to one event loop."""

    def generate(
        self, address: WorkerAddress, command: GenerateCommand, prompt: npt.NDArray[np.int32], receive: Receive
    ) -> WorkerStream:
        """Start a request; `prompt` is `[num_tokens] int32`. Calls `receive` later, never before it returns.

        Raises:
            WorkerDied: The worker is known to have gone.
        """

    async def control(self, address: WorkerAddress, command: DrainCommand | None) -> WorkerStatus:
        """Drain a worker, or with None ask for its status.

        Raises:
            KelpError: The worker's typed error, or WorkerLost when the connection broke.
        """

    def expect(self, addresses: Iterable[WorkerAddress]) -> None:
        """Requests may come for these: what takes time is done beforehand, so that none has to go the longer way."""

    def has_gone(self, address: WorkerAddress) -> bool:
        """Whether this incarnation is known to have ended; False: perhaps."""

    async def close(self) -> None:
        """Close all connections."""


class KvManagerClient(Protocol):
    """Connections to KV block managers; belongs to one event loop."""

    async def call(self, address: WorkerAddress, operations: Sequence[Operation], timeout_s: float) -> list[Result]:
        """A result for each operation, in order; they may be asked for in several calls at the same time.

        Raises:
            WorkerLost: The manager cannot be reached, or is not loaded.
            DeadlineExceeded: It did not answer in time.
            ProtocolError: It answers what makes no sense.
        """

    async def close(self) -> None:
        """Close all connections."""
