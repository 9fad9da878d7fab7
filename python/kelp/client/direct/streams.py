"""What a router waits for on a direct channel: a request's outputs, or a worker's status.

Knows one number on a connection; the connection hands over what comes for it.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from kelp.client.base import Receive, WorkerOutput
from kelp.client.direct.wire import Output
from kelp.core.errors import KelpError, ProtocolError, from_message
from kelp.core.messages import WORKER_EVENT, WORKER_STATUS, Finished, WorkerStatus
from kelp.core.wire import decode_message

_DRAIN_TIMEOUT_S = 5.0


class Pending(Protocol):
    """Something that waits for a worker's outputs."""

    def take(self, output: Output) -> None:
        """The worker has said something.

        Raises:
            ProtocolError: It makes no sense.
        """

    def end(self, error: KelpError | None) -> None:
        """Nothing more comes."""


class StreamOwner(Protocol):
    """The connection, as its streams see it."""

    @property
    def where(self) -> str:
        """Names the worker in errors."""

    def cancel(self, number: int) -> None:
        """Tell the worker to end a request."""

    def forget(self, number: int) -> None:
        """Nobody waits for that any more."""


class DirectStream:
    """One request; see `client.base.WorkerStream`."""

    def __init__(self, owner: StreamOwner, number: int, receive: Receive) -> None:
        self._owner = owner
        self._number = number
        self._receive = receive
        self._ended: asyncio.Future[None] | None = None
        self._has_ended = False

    @property
    def has_ended(self) -> bool:
        """See `WorkerStream`."""
        return self._has_ended

    def take(self, output: Output) -> None:
        """See `Pending`."""
        where = self._owner.where
        if len(output.token_ids) != len(output.log_probs):
            raise ProtocolError(f"{where}: {len(output.token_ids)} tokens with {len(output.log_probs)} log_probs")
        event = decode_message(WORKER_EVENT, output.event, where) if output.event else None
        if isinstance(event, Finished) != (output.is_last and not output.error):
            raise ProtocolError(f"{where}: a request ends with `finished` or an error, and with nothing else")
        if output.token_ids or not output.error:
            self._receive(WorkerOutput(output.token_ids, output.log_probs, event))
        if output.is_last:
            self.end(from_message(output.error) if output.error else None)

    def end(self, error: KelpError | None) -> None:
        """See `Pending`."""
        self._has_ended = True
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        self._receive(error)

    async def close(self) -> None:
        """See `WorkerStream`."""
        if self._has_ended or self._ended is not None:
            return
        self._ended = asyncio.get_running_loop().create_future()
        self._owner.cancel(self._number)
        await asyncio.wait({self._ended}, timeout=_DRAIN_TIMEOUT_S)
        self._owner.forget(self._number)


class StatusAnswer:
    """The answer to a DrainCommand or StatusCommand.

    Attributes:
        status: Done when it has come; fails with the worker's error.
    """

    def __init__(self, where: str) -> None:
        self._what = f"status of {where}"
        self.status: asyncio.Future[WorkerStatus] = asyncio.get_running_loop().create_future()

    def take(self, output: Output) -> None:
        """See `Pending`."""
        if output.error:
            self.end(from_message(output.error))
        elif not self.status.done():
            self.status.set_result(decode_message(WORKER_STATUS, output.event, self._what))

    def end(self, error: KelpError | None) -> None:
        """See `Pending`."""
        if not self.status.done():
            self.status.set_exception(error or ProtocolError(f"{self._what}: the answer has no status"))
