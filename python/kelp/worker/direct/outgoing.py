"""What the requests of one connection say, on its way to the router.

Requests speak from the executor's thread. The loop is woken once for all that they say until it gets to run, and sends
it in one frame. A router that does not read lets it pile up here, up to a limit in time and one in number.

Waking the loop takes longer than sending. So the first tokens of a lone request, for which a client waits and which
nothing could share a frame with, are sent by the executor's thread if nothing is ahead of them.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Callable, Sized

from kelp.client.direct.wire import Output, encode_outputs
from kelp.core.exchange import as_kelp_error
from kelp.executor.base import Tokens
from kelp.worker.direct.channel import ChannelItem, DirectChannel

_HIGH_WATER_BYTES = 1024 * 1024
_MAX_HELD_ITEMS = 65536


class Outgoing:
    """Belongs to the loop, but for `post`.

    Args:
        stall_timeout_s: How long the router may leave unread what has been sent.
        requests: Those under way on the connection.
        on_sent_last: Called with each request whose last output has been handed to the socket.
        on_stalled: Called once, with what the router has done, when it is to be given up.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        stall_timeout_s: float,
        requests: Sized,
        on_sent_last: Callable[[DirectChannel], None],
        on_stalled: Callable[[str], None],
    ) -> None:
        transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        self._transport = transport
        self._stall_timeout_s = stall_timeout_s
        self._requests = requests
        self._on_sent_last = on_sent_last
        self._on_stalled = on_stalled
        self._loop = asyncio.get_running_loop()
        self._said: deque[tuple[DirectChannel, ChannelItem]] = deque()
        self._is_woken = self._is_paused = self._is_overfull = self._is_closed = False
        self._stall_timer: asyncio.TimerHandle | None = None
        # Of its own, so that the transport's may be closed by the loop while another thread sends.
        self._socket: socket.socket = transport.get_extra_info("socket").dup()
        self._lock = threading.Lock()
        self._rest = b""
        self._has_backlog = False

    @property
    def num_held(self) -> int:
        """Items that have not been sent."""
        return len(self._said)

    def post(self, channel: DirectChannel, item: ChannelItem) -> None:
        """Queue something to say; any thread, never blocks."""
        if self._is_closed or (self._is_urgent(channel, item) and self._send_at_once(channel, item)):
            return
        # The item is there before the flag is looked at, and the loop clears the flag before it takes items.
        self._said.append((channel, item))
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon_threadsafe(self.flush)
        elif len(self._said) > _MAX_HELD_ITEMS and not self._is_overfull:
            self._is_overfull = True
            self._loop.call_soon_threadsafe(self._check_held)

    def flush(self) -> None:
        """Send all that has been said; while the router does not read, nothing."""
        if self._is_paused or self._is_closed:
            return
        self._is_woken = False
        by_channel: dict[DirectChannel, list[ChannelItem]] = {}
        with self._lock:
            if self._rest:
                self._transport.write(self._rest)
                self._rest = b""
            while self._said:
                channel, item = self._said.popleft()
                if not channel.is_over:
                    by_channel.setdefault(channel, []).append(item)
            outputs = [_output(channel, items) for channel, items in by_channel.items()]
            for frame in encode_outputs(outputs):
                self._transport.write(frame)
            self._has_backlog = self._transport.get_write_buffer_size() > 0
        for channel in by_channel:
            if channel.is_over:
                self._on_sent_last(channel)

    def pause(self) -> None:
        """The router does not keep up."""
        # Nobody needs to be woken for what is said from now on.
        self._is_paused = self._is_woken = True
        text = f"has read nothing for {self._stall_timeout_s:g} s"
        self._stall_timer = self._loop.call_later(self._stall_timeout_s, self._on_stalled, text)

    def resume(self) -> None:
        """It does again."""
        self._is_paused = False
        self._stop_timer()
        self.flush()

    def close(self) -> None:
        """Nothing is sent any more."""
        self._is_closed = True
        with self._lock:
            self._socket.close()
        self._said.clear()
        self._stop_timer()

    def _is_urgent(self, channel: DirectChannel, item: ChannelItem) -> bool:
        if channel.has_said_tokens or not isinstance(item, Tokens) or not item.token_ids:
            return False
        channel.has_said_tokens = True
        return len(self._requests) == 1

    def _send_at_once(self, channel: DirectChannel, item: ChannelItem) -> bool:
        """Send past the loop, from any thread; False if it has to go the ordinary way."""
        with self._lock:
            if self._is_closed or self._is_paused or self._has_backlog or self._rest or self._said or channel.is_over:
                return False
            try:
                frame = b"".join(encode_outputs([channel.output([item])]))
            except Exception:
                # What is wrong with it is said by the loop, whose the channel is.
                return False
            self._rest = frame[_sent(self._socket, frame) :]
        if self._rest:
            self._loop.call_soon_threadsafe(self.flush)
        return True

    def _check_held(self) -> None:
        self._is_overfull = False
        if self._is_paused and not self._is_closed:
            self._on_stalled(f"leaves {len(self._said)} outputs unread")

    def _stop_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def _output(channel: DirectChannel, items: list[ChannelItem]) -> Output:
    """What one request cannot say must not keep the others from speaking."""
    try:
        return channel.output(items)
    except Exception as error:
        return channel.failed(as_kelp_error(error))


def _sent(connection: socket.socket, frame: bytes) -> int:
    """How many bytes the socket took; a connection that is broken is for the loop to find."""
    try:
        return connection.send(frame)
    except OSError:
        return 0
