"""The worker's end of a direct channel: one connection of one router, with all its requests.

Whatever a router sends is checked before it is believed; what makes no sense ends the connection, and the router hears
why. When the connection ends, its requests are aborted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kelp.client.direct.frames import FrameReader, framed
from kelp.client.direct.sockets import configure
from kelp.client.direct.wire import (
    MAX_HELLO_BYTES,
    MAX_ROUTER_FRAME_BYTES,
    PROTOCOL_VERSION,
    Cancel,
    Control,
    Hello,
    Refusal,
    RouterFrame,
    Start,
    Welcome,
    decode_router_frame,
    encode_frame,
)
from kelp.core.errors import (
    CapacityError,
    InternalError,
    InvalidRequest,
    KelpError,
    ProtocolError,
    RequestCancelled,
    WorkerLost,
)
from kelp.core.exchange import as_kelp_error
from kelp.core.messages import WORKER_COMMAND, DrainCommand, GenerateCommand, StatusCommand, WorkerStatus
from kelp.core.peer_auth import PeerToken
from kelp.core.peer_handshake import Responder
from kelp.core.wire import decode_message
from kelp.worker.channel import Channel
from kelp.worker.direct.channel import DirectChannel
from kelp.worker.direct.outgoing import Outgoing

_log = logging.getLogger(__name__)
_HELLO_TIMEOUT_S = 5.0
_FAREWELL_S = 1.0
_MAX_REQUESTS = 16384


class CommandHandler(Protocol):
    """What a connection needs of `worker.service`."""

    async def generate(self, command: GenerateCommand, prompt: npt.NDArray[np.int32], channel: Channel) -> None:
        """Serve a request to its end, or raise."""

    async def control(self, command: DrainCommand | StatusCommand) -> WorkerStatus:
        """Obey, and say how things are then."""


@dataclass(frozen=True, slots=True)
class DirectParts:
    """What the connections of a worker share.

    Attributes:
        worker_id: Whom routers must mean.
        epoch: And which incarnation.
        stall_timeout_s: How long a router may leave unread what has been sent.
        token: What routers must know; None: nothing.
    """

    handler: CommandHandler
    worker_id: str
    epoch: str
    stall_timeout_s: float
    token: PeerToken | None = None


class RouterConnection(asyncio.Protocol):
    """See the module docstring.

    Args:
        responder: What the router has to show first; None: nothing.
        on_lost: Called once, when the connection has ended.

    Attributes:
        is_welcome: The router has said who it is, and whom it means.
        is_refused: There are too many connections; this one hears so.
        why_refused: Why it ended before it was welcomed; for the owner to say, who knows how many there are.
    """

    def __init__(
        self, parts: DirectParts, responder: Responder | None, on_lost: Callable[[RouterConnection], None]
    ) -> None:
        self.is_refused = False
        self.why_refused = ""
        self._parts = parts
        self._responder = responder
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._what = "direct channel of a router"
        self._reader = FrameReader(self._what, MAX_HELLO_BYTES)
        self._channels: dict[int, DirectChannel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_number = -1
        self.is_welcome = self._is_ending = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_stranger(self) -> bool:
        """Whether it is still expected to say so."""
        return not (self.is_welcome or self._is_ending or self.is_refused)

    @property
    def num_requests(self) -> int:
        """Requests, and control commands, that have not been answered to the end."""
        return len(self._channels)

    @property
    def num_held(self) -> int:
        """Items that the router does not take."""
        return self._outgoing.num_held

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)
        configure(transport)
        self._transport = transport
        timeout_s, requests = self._parts.stall_timeout_s, self._channels
        self._outgoing = Outgoing(transport, timeout_s, requests, self._note_sent_last, self._give_up)
        self._timer = self._loop.call_later(_HELLO_TIMEOUT_S, self._give_up, "said no hello")
        if self.is_refused:
            self._refuse(CapacityError("too many routers are connected"))

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        try:
            for raw in self._reader.feed(data):
                if self._is_ending:
                    return
                if self._responder is not None:
                    self._challenge(self._responder, raw)
                else:
                    self._take(decode_router_frame(raw, self._what))
        except KelpError as error:
            self._refuse(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._break_off()
        if self._timer is not None:
            self._timer.cancel()
        self._on_lost(self)

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._outgoing.pause()

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._outgoing.resume()

    async def stop(self) -> None:
        """Say what is still to be said, and end the connection."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._outgoing.flush()
        self._end(WorkerLost(f"worker {self._parts.worker_id} is stopping"))

    def make_room(self) -> None:
        """Others wait, and the router has not been welcomed yet."""
        if self._timer is None:
            self.is_refused = True
        else:
            self._give_up("has not said hello, and others wait")

    def _challenge(self, responder: Responder, raw: bytes) -> None:
        answer = responder.take(raw)
        if responder.is_done:
            self._responder = None
        else:
            self._transport.write(framed(answer))

    def _take(self, frame: RouterFrame) -> None:
        if isinstance(frame, Hello):
            self._welcome(frame)
        elif not self.is_welcome:
            raise ProtocolError(f"{self._what}: {type(frame).__name__.lower()} before hello")
        elif isinstance(frame, Cancel):
            self._cancel(frame.number)
        else:
            self._begin(frame)

    def _welcome(self, hello: Hello) -> None:
        parts = self._parts
        if self.is_welcome or hello.version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"{self._what}: hello of version {hello.version}, once and of version {PROTOCOL_VERSION} expected"
            )
        if (hello.worker_id, hello.epoch) != (parts.worker_id, parts.epoch):
            raise WorkerLost(
                f"worker {hello.worker_id} of epoch {hello.epoch} is meant, this is {parts.worker_id} of {parts.epoch}"
            )
        self.is_welcome = True
        if self._timer is not None:
            self._timer.cancel()
        self._reader.max_bytes = MAX_ROUTER_FRAME_BYTES
        self._transport.write(encode_frame(Welcome(PROTOCOL_VERSION)))

    def _cancel(self, number: int) -> None:
        if number > self._last_number:
            raise ProtocolError(f"{self._what}: cancel: request {number} was never started")
        channel = self._channels.get(number)
        if channel is not None:
            channel.cancel(RequestCancelled("the client cancelled or went away"))

    def _begin(self, frame: Start | Control) -> None:
        if frame.number <= self._last_number:
            raise ProtocolError(f"{self._what}: number {frame.number} given, {self._last_number} was the last")
        self._last_number = frame.number
        channel = self._channels[frame.number] = DirectChannel(frame.number, self._outgoing.post)
        if len(self._channels) > _MAX_REQUESTS:
            channel.put(CapacityError(f"{_MAX_REQUESTS} requests of one router are under way"))
            return
        work = self._generate(frame, channel) if isinstance(frame, Start) else self._control(frame, channel)
        task = self._loop.create_task(self._guarded(work, channel))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _generate(self, frame: Start, channel: DirectChannel) -> None:
        command = decode_message(WORKER_COMMAND, frame.command, "command")
        if not isinstance(command, GenerateCommand):
            raise InvalidRequest(f"command: {command.op} given, generate expected")
        if len(frame.prompt) % 4:
            raise InvalidRequest(f"prompt: {len(frame.prompt)} bytes are no whole number of tokens")
        prompt = np.frombuffer(frame.prompt, dtype="<i4").astype(np.int32)
        await self._parts.handler.generate(command, prompt, channel)
        if not channel.is_over:
            raise InternalError("the request ended without saying how")

    async def _control(self, frame: Control, channel: DirectChannel) -> None:
        command = decode_message(WORKER_COMMAND, frame.command, "command")
        if not isinstance(command, DrainCommand | StatusCommand):
            raise InvalidRequest(f"command: {command.op} given, drain or status expected")
        channel.put(await self._parts.handler.control(command))

    async def _guarded(self, work: Coroutine[Any, Any, None], channel: DirectChannel) -> None:
        try:
            await work
        except asyncio.CancelledError:
            channel.put(WorkerLost(f"worker {self._parts.worker_id} is stopping"))
        except Exception as error:
            channel.put(as_kelp_error(error))

    def _note_sent_last(self, channel: DirectChannel) -> None:
        self._channels.pop(channel.number, None)
        channel.note_sent_last()

    def _refuse(self, error: KelpError) -> None:
        if not self._is_ending:
            self._note_end(str(error))
            self._end(error)

    def _note_end(self, why: str) -> None:
        if self.is_welcome:
            _log.warning("a router's direct channel is closed: %s", why)
        else:
            self.why_refused = self.why_refused or why

    def _end(self, error: KelpError) -> None:
        """The router hears why; if it does not listen, it is cut off."""
        if self._is_ending:
            return
        self._break_off()
        self._transport.write(encode_frame(Refusal(str(error))))
        self._transport.close()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(_FAREWELL_S, self._transport.abort)

    def _give_up(self, what: str) -> None:
        self._note_end(f"it {what}")
        self._transport.abort()
        self._break_off()

    def _break_off(self) -> None:
        self._is_ending = True
        self._outgoing.close()
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.break_off(RequestCancelled("the router's connection has ended"))
