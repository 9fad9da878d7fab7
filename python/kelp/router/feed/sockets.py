"""The ZMQ sockets of one subscription, non-blocking and watched by an asyncio loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import zmq

from kelp.core.config import EventsConfig
from kelp.core.peer_auth import PeerToken
from kelp.kv.events.curve import OVERHEAD_BYTES, connect_to_known
from kelp.kv.events.frames import CURVE_PURPOSE

_RECEIVE_HWM = 4096
_RECONNECT_MS, _MAX_RECONNECT_MS = 100, 5000
_HEARTBEAT_MS = 5000


class Received(NamedTuple):
    """Frames that came by themselves (`attempt` None), or as answer to an attempt."""

    attempt: int | None
    frames: list[bytes]


class SubscriptionSockets:
    """A SUB socket from the start, and a DEALER per request, so that late answers to an earlier one never mix in.

    Args:
        context: Shared by all subscriptions.
        endpoint: `host:port` of the events.
        replay_endpoint: `host:port` for requests; empty for none.
        on_ready: Called in the loop when `read` may find something.
        token: What the publisher knows; None for one that asks for nothing.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        config: EventsConfig,
        endpoint: str,
        replay_endpoint: str,
        on_ready: Callable[[], None],
        token: PeerToken | None = None,
    ) -> None:
        self._token = token
        self._context = context
        self._config = config
        self._replay_endpoint = replay_endpoint
        self._on_ready = on_ready
        self._loop = asyncio.get_running_loop()
        self._attempt = 0
        self._dealer: zmq.Socket[bytes] | None = None
        self._sub = self._connect(zmq.SUB, endpoint)
        self._sub.setsockopt(zmq.SUBSCRIBE, b"")

    def ask(self, attempt: int, request: bytes) -> bool:
        """Send a request; only its answers will be read from now on.

        Returns:
            Whether it was sent.
        """
        self.end_request()
        self._attempt = attempt
        self._dealer = self._connect(zmq.DEALER, self._replay_endpoint)
        try:
            self._dealer.send_multipart([b"", request], zmq.NOBLOCK)
        except zmq.Again:
            return False
        # Sending may swallow the edge that announces an answer.
        self._loop.call_soon(self._on_ready)
        return True

    def end_request(self) -> None:
        """No more answers are wanted."""
        if self._dealer is not None:
            self._disconnect(self._dealer)
            self._dealer = None

    def read(self, max_messages: int) -> list[Received]:
        """What has come, answers first; fewer than `max_messages` only if nothing is left."""
        received: list[Received] = []
        if self._dealer is not None:
            received += [Received(self._attempt, frames) for frames in _read(self._dealer, max_messages)]
        return received + [Received(None, frames) for frames in _read(self._sub, max_messages - len(received))]

    def close(self) -> None:
        """Disconnect; idempotent."""
        self.end_request()
        if not self._sub.closed:
            self._disconnect(self._sub)

    def _connect(self, kind: int, endpoint: str) -> zmq.Socket[bytes]:
        connected = self._context.socket(kind)
        connected.setsockopt(zmq.LINGER, 0)
        connected.setsockopt(zmq.RCVHWM, _RECEIVE_HWM)
        connected.setsockopt(zmq.MAXMSGSIZE, self._config.max_message_bytes + OVERHEAD_BYTES)
        connected.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        connected.setsockopt(zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS)
        connected.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        connected.setsockopt(zmq.IPV6, int("[" in endpoint))
        connect_to_known(connected, self._token, CURVE_PURPOSE)
        try:
            connected.connect(f"tcp://{endpoint}")
        except zmq.ZMQError:
            connected.close()
            raise
        self._loop.add_reader(_descriptor(connected), self._on_ready)
        return connected

    def _disconnect(self, connected: zmq.Socket[bytes]) -> None:
        self._loop.remove_reader(_descriptor(connected))
        connected.close(linger=0)


def _descriptor(connected: zmq.Socket[bytes]) -> int:
    descriptor = connected.getsockopt(zmq.FD)
    assert isinstance(descriptor, int)
    return descriptor


def _read(connected: zmq.Socket[bytes], max_messages: int) -> list[list[bytes]]:
    messages: list[list[bytes]] = []
    while len(messages) < max_messages:
        try:
            messages.append(connected.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            break
    return messages
