"""The publishing thread of one worker: takes the engine's events, serves PUB and ROUTER."""

from __future__ import annotations

import logging
import math
import random
import select
import socket
import threading

import zmq

from kelp.core.clock import Clock
from kelp.core.config import EventsConfig
from kelp.core.errors import ConfigError
from kelp.core.kv_events import KVEvent
from kelp.core.peer_auth import PeerToken
from kelp.kv.events.answers import AnswerDesk
from kelp.kv.events.curve import listen_to_known
from kelp.kv.events.frames import CURVE_PURPOSE
from kelp.kv.events.stream import EventStream, StreamMessage

_BUSY_POLL_S = 0.005
_PUB_HWM = 100_000
_ANSWER_HWM = 16
_log = logging.getLogger(__name__)


class EventPublisher:
    """Binds at once, publishes from `start` on; with a token, for those who know it.

    Raises:
        ConfigError: A port is taken, or `events.host` is no address of this machine.
    """

    def __init__(
        self, epoch: str, block_size: int, config: EventsConfig, clock: Clock, token: PeerToken | None = None
    ) -> None:
        self._config = config
        self._token = token
        self._clock = clock
        self._stream = EventStream(epoch, block_size, config, clock)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._pub = self._bind(zmq.PUB, "events.port", config.port)
            self._router = self._bind(zmq.ROUTER, "events.replay_port", config.replay_port)
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._desk = AnswerDesk(self._router, self._stream, self._send, clock, config.request_timeout_s)
        self._waker, self._wakee = socket.socketpair()
        self._waker.setblocking(False)
        self._wakee.setblocking(False)
        self._is_awake = False
        self._is_closing = False
        self._faults = random.Random(epoch)
        self._late: StreamMessage | None = None
        self._thread = threading.Thread(target=self._run, name="kelp-kv-events", daemon=True)

    @property
    def endpoint(self) -> str:
        """`host:port` of the events."""
        return self._endpoint(self._pub)

    @property
    def replay_endpoint(self) -> str:
        """`host:port` where missed events and snapshots are asked for."""
        return self._endpoint(self._router)

    def start(self) -> None:
        """Publish from a thread of its own until `close`."""
        self._thread.start()

    def sink(self, event: KVEvent) -> None:
        """For `Executor.watch_kv`: one thread's; returns at once."""
        self._stream.put(event)
        if not self._is_awake:
            self._is_awake = True
            self._wake()

    def close(self) -> None:
        """Publish what is queued, stop the thread and close the sockets; idempotent. The sink must be silent."""
        if self._context.closed:
            return
        self._is_closing = True
        self._wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._context.destroy(linger=0)
        self._waker.close()
        self._wakee.close()

    def _bind(self, kind: int, field: str, port: int) -> zmq.Socket[bytes]:
        bound = self._context.socket(kind)
        bound.setsockopt(zmq.LINGER, 0)
        bound.setsockopt(zmq.SNDHWM, _PUB_HWM if kind == zmq.PUB else _ANSWER_HWM)
        bound.setsockopt(zmq.MAXMSGSIZE, self._config.max_message_bytes if kind == zmq.PUB else 1024)
        bound.setsockopt(zmq.IPV6, int(":" in self._config.host))
        listen_to_known(bound, self._token, CURVE_PURPOSE)
        try:
            bound.bind(f"tcp://{_bracketed(self._config.host)}:{port or '*'}")
        except zmq.ZMQError as error:
            raise ConfigError(f"{field}: {self._config.host}:{port} cannot be bound: {error.strerror}") from None
        return bound

    def _endpoint(self, bound: zmq.Socket[bytes]) -> str:
        last = bound.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(last, bytes)
        port = last.rstrip(b"\0").decode().rpartition(":")[2]
        return f"{_bracketed(self._config.host)}:{port}"

    def _wake(self) -> None:
        try:
            self._waker.send(b"\0")
        except BlockingIOError:
            return

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            _log.exception("the KV event thread has failed; routers fall back to guesses")

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wakee.fileno(), select.POLLIN)
        poller.register(self._router, zmq.POLLIN)
        flush_s = digest_s = now_s = self._clock.monotonic_s()
        while not self._is_closing:
            busy_s = math.inf if self._desk.is_idle else now_s + _BUSY_POLL_S
            ready = poller.poll(max(0, math.ceil((min(flush_s, digest_s, busy_s) - now_s) * 1e3)))
            now_s = self._clock.monotonic_s()
            for source, _ in ready:
                if source is self._router:
                    self._desk.receive()
                else:
                    self._wakee.recv(64)
                    flush_s = min(flush_s, now_s + self._config.flush_interval_s)
            if now_s >= flush_s:
                flush_s = math.inf
                # The flush takes whatever came before the engine's thread saw that it must wake this one again.
                self._is_awake = False
                self._send(self._stream.flush())
            if now_s >= digest_s:
                digest_s = now_s + self._config.digest_interval_s
                self._send_one(self._stream.digest())
            if not self._desk.is_idle:
                self._desk.send()
        self._send(self._stream.flush())

    def _send(self, messages: list[StreamMessage]) -> None:
        for message in messages:
            if self._happens(self._config.drop_share):
                continue
            late, self._late = self._late, None
            if late is None and self._happens(self._config.reorder_share):
                self._late = message
                continue
            self._send_one(message)
            if self._happens(self._config.duplicate_share):
                self._send_one(message)
            if late is not None:
                self._send_one(late)

    def _happens(self, share: float) -> bool:
        return share > 0 and self._faults.random() < share

    def _send_one(self, message: StreamMessage) -> None:
        # Frame by frame: `send_multipart` costs three times as much.
        topic, seq, payload = message.frames()
        self._pub.send(topic, zmq.SNDMORE)
        self._pub.send(seq, zmq.SNDMORE)
        self._pub.send(payload)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
