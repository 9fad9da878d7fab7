"""What the requests of one connection say, on its way to the router.

Requests speak from the executor's thread. The loop is woken once for all that they say until it gets to run, and sends
it in one frame. A router that does not read lets it pile up here, up to a limit in time and one in number.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from kelp.client.direct.wire import Output, encode_outputs
from kelp.core.exchange import as_kelp_error
from kelp.worker.direct.channel import ChannelItem, DirectChannel

_HIGH_WATER_BYTES = 1024 * 1024
_MAX_HELD_ITEMS = 65536


class Outgoing:
    """Belongs to the loop, but for `post`.

    Args:
        stall_timeout_s: How long the router may leave unread what has been sent.
        on_sent_last: Called with each request whose last output has been handed to the socket.
        on_stalled: Called once, with what the router has done, when it is to be given up.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        stall_timeout_s: float,
        on_sent_last: Callable[[DirectChannel], None],
        on_stalled: Callable[[str], None],
    ) -> None:
        transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        self._transport = transport
        self._stall_timeout_s = stall_timeout_s
        self._on_sent_last = on_sent_last
        self._on_stalled = on_stalled
        self._loop = asyncio.get_running_loop()
        self._said: deque[tuple[DirectChannel, ChannelItem]] = deque()
        self._is_woken = self._is_paused = self._is_overfull = self._is_closed = False
        self._stall_timer: asyncio.TimerHandle | None = None

    @property
    def num_held(self) -> int:
        """Items that have not been sent."""
        return len(self._said)

    def post(self, channel: DirectChannel, item: ChannelItem) -> None:
        """Queue something to say; any thread, never blocks."""
        if self._is_closed:
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
        while self._said:
            channel, item = self._said.popleft()
            if not channel.is_over:
                by_channel.setdefault(channel, []).append(item)
        outputs = [_output(channel, items) for channel, items in by_channel.items()]
        for frame in encode_outputs(outputs):
            self._transport.write(frame)
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
        self._said.clear()
        self._stop_timer()

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
