"""The router's end of a direct channel: one connection to one incarnation of a worker, shared by all requests to it.

What the worker says goes from the socket's reading straight to whoever waits for it: no task, queue or future per
output. When the connection ends, every request on it is over at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kelp.client.base import Receive, WorkerAddress
from kelp.client.direct.frames import FrameReader, framed
from kelp.client.direct.sockets import configure
from kelp.client.direct.streams import DirectStream, Pending, StatusAnswer
from kelp.client.direct.wire import (
    MAX_WELCOME_BYTES,
    MAX_WORKER_FRAME_BYTES,
    PROTOCOL_VERSION,
    Cancel,
    Control,
    Hello,
    Outputs,
    Refusal,
    RouterFrame,
    Start,
    WorkerFrame,
    decode_worker_frame,
    encode_frame,
    handshake_names,
)
from kelp.core.errors import KelpError, ProtocolError, WorkerDied, WorkerLost, from_message
from kelp.core.messages import GenerateCommand, WorkerStatus
from kelp.core.peer_auth import PeerToken
from kelp.core.peer_handshake import Initiator
from kelp.core.wire import Message, encode_message

_MAX_UNREAD_BYTES = 128 * 1024 * 1024
"""Sent but not taken by the worker: beyond, it counts as lost."""


class DirectConnection(asyncio.Protocol):
    """See the module docstring; `client.direct.dialling` makes them.

    Args:
        on_lost: Called once, when a connection that had been welcomed has ended.
        token: What the two show each other first; None: nothing.

    Attributes:
        welcomed: Done when requests may start; fails with the worker's refusal, or whatever went wrong before.
    """

    def __init__(self, address: WorkerAddress, on_lost: Callable[[], None], token: PeerToken | None = None) -> None:
        self._where = f"worker {address.worker_id} at {address.direct_endpoint}"
        self._hello = Hello(PROTOCOL_VERSION, address.worker_id, address.epoch)
        self._on_lost = on_lost
        names = handshake_names(address.worker_id, address.epoch, address.direct_endpoint)
        self._initiator = None if token is None else Initiator(token, names, self._where)
        self._reader = FrameReader(self._where, MAX_WELCOME_BYTES)
        self._open: dict[int, Pending] = {}
        self._next_number = 0
        self._transport: asyncio.Transport | None = None
        self._error: KelpError | None = None
        self.welcomed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def where(self) -> str:
        """Names the worker in errors."""
        return self._where

    @property
    def is_usable(self) -> bool:
        """Whether requests may start here."""
        return self._error is None and self.welcomed.done()

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def start(self, command: GenerateCommand, prompt: npt.NDArray[np.int32], receive: Receive) -> DirectStream:
        """Start a request."""
        number = self._number()
        stream = self._open[number] = DirectStream(self, number, receive)
        self._send(Start(number, encode_message(command), prompt.astype("<i4", copy=False).tobytes()))
        return stream

    async def control(self, command: Message) -> WorkerStatus:
        """Send a DrainCommand or StatusCommand.

        Raises:
            KelpError: The worker's typed error, or WorkerLost when the connection broke.
        """
        number = self._number()
        answer = self._open[number] = StatusAnswer(self._where)
        self._send(Control(number, encode_message(command)))
        try:
            return await answer.status
        finally:
            self.forget(number)

    def cancel(self, number: int) -> None:
        """Tell the worker to end a request, which still says how it ended."""
        self._send(Cancel(number))

    def forget(self, number: int) -> None:
        """Nobody waits for that any more."""
        self._open.pop(number, None)

    def close(self) -> None:
        """End the connection; what is open on it fails with WorkerLost. Idempotent."""
        self._fail(WorkerLost(f"{self._where}: connection broke: closed here"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)
        configure(transport)
        self._transport = transport
        if self._initiator is None:
            self._send(self._hello)
        else:
            transport.write(framed(self._initiator.opening))

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        try:
            for raw in self._reader.feed(data):
                if self._initiator is not None:
                    self._prove(self._initiator, raw)
                else:
                    self._take(decode_worker_frame(raw, self._where))
        except KelpError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        # A worker that leaves ends its requests first; a network that parts ends nothing.
        error_type = WorkerDied if exc is None or isinstance(exc, ConnectionError) else WorkerLost
        self._fail(error_type(f"{self._where}: connection broke: {exc or 'the worker closed it'}"))

    def _prove(self, initiator: Initiator, raw: bytes) -> None:
        if self._error is not None or self._transport is None:
            return
        self._transport.write(framed(initiator.prove(raw)))
        self._initiator = None
        self._send(self._hello)

    def _take(self, frame: WorkerFrame) -> None:
        if self._error is not None:
            return
        if isinstance(frame, Refusal):
            raise from_message(frame.error)
        if isinstance(frame, Outputs):
            self._take_outputs(frame)
        elif self.welcomed.done() or frame.version != PROTOCOL_VERSION:
            raise ProtocolError(f"{self._where}: welcome for version {frame.version}, once and for 1 expected")
        else:
            self._reader.max_bytes = MAX_WORKER_FRAME_BYTES
            self.welcomed.set_result(None)

    def _take_outputs(self, frame: Outputs) -> None:
        for output in frame.items:
            if output.number >= self._next_number:
                raise ProtocolError(f"{self._where}: output for request {output.number}, which was never started")
            pending = self._open.get(output.number)
            if pending is None:
                continue
            pending.take(output)
            if output.is_last:
                self.forget(output.number)

    def _number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

    def _send(self, frame: RouterFrame) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(encode_frame(frame))
        if self._transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            error = WorkerLost(f"{self._where}: connection broke: more than {_MAX_UNREAD_BYTES} bytes are not read")
            asyncio.get_running_loop().call_soon(self._fail, error)

    def _fail(self, error: KelpError) -> None:
        if self._error is not None:
            return
        self._error = error
        if self._transport is not None:
            self._transport.abort()
        was_welcomed = self.welcomed.done()
        if not was_welcomed:
            self.welcomed.set_exception(error)
        pending, self._open = self._open, {}
        for waiting in pending.values():
            waiting.end(error)
        if was_welcomed:
            self._on_lost()
