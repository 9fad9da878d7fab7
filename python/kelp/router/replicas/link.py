"""Carries `replicas` over ZMQ: a PUB socket for this router's loads, a SUB for the others', and questions between them.

Routers find each other through the registry. Nothing here is waited for by a request, but for `ask_all` (explanations).
Sockets listen where `replicas.host` says, loopback unless configured otherwise, for those who know the peers' token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio

from kelp.core.clock import Clock
from kelp.core.config_replicas import ReplicasConfig
from kelp.core.errors import ProtocolError
from kelp.core.peer_auth import PeerToken
from kelp.kv.events.curve import OVERHEAD_BYTES, connect_to_known, listen_to_known
from kelp.registry.base import RouterRecord, RouterRegistry
from kelp.router.replicas.loads import OwnLoads, PeerLoads
from kelp.router.replicas.messages import MAX_MESSAGE_BYTES, Deltas, Snapshot, decode, encode

_log = logging.getLogger(__name__)
_SNAPSHOT, _EXPLAIN = b"snapshot", b"explain"
_MAX_QUESTION_BYTES = 4096
_CURVE_PURPOSE = "routers"
_ASK_TIMEOUT_S = 1.0
_RENEWALS_PER_LEASE = 4

Explain = Callable[[str], bytes | None]
"""What this router knows of a decision, as JSON."""


@dataclass(frozen=True, slots=True)
class LinkParts:
    """What a link joins together.

    Attributes:
        own: Every change to it must be followed by `ReplicaLink.notify`.
        token: What routers know; None: nobody is asked.
    """

    own: OwnLoads
    peers: PeerLoads
    registry: RouterRegistry
    clock: Clock
    explain: Explain
    token: PeerToken | None = None


class ReplicaLink:
    """One router's connections to all others; made and used on one event loop."""

    def __init__(self, parts: LinkParts, config: ReplicasConfig) -> None:
        self._parts = parts
        self._config = config
        self._news = asyncio.Event()
        self._records: dict[str, RouterRecord] = {}
        self._asking: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_reachable = True

    async def start(self) -> None:
        """Listen, become visible, and meet the others."""
        self._context = zmq.asyncio.Context()
        self._publisher, publisher_port = self._bound(zmq.PUB)
        self._answerer, answerer_port = self._bound(zmq.ROUTER)
        self._subscriber = self._connecting(zmq.SUB)
        self._subscriber.subscribe(b"")
        host = self._config.host
        self._record = RouterRecord(
            router_id=self._parts.own.router_id,
            epoch=self._parts.own.epoch,
            loads_endpoint=f"{host}:{publisher_port}",
            answers_endpoint=f"{host}:{answerer_port}",
        )
        await self._meet()
        for loop in (self._keep_meeting(), self._publish(), self._receive(), self._answer()):
            self._start(loop)

    async def stop(self) -> None:
        """Leave: the others forget this router's requests at once."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await asyncio.to_thread(self._parts.registry.withdraw, self._record.router_id, self._record.epoch)
        except OSError as error:
            _log.warning("record %s not withdrawn, it expires: %s", self._record.router_id, error)
        self._context.destroy(linger=0)

    @property
    def num_stale(self) -> int:
        """Other routers of whose requests too little is known."""
        return self._parts.peers.num_stale(self._parts.clock.monotonic_s())

    def notify(self) -> None:
        """Something of `own` has changed."""
        self._news.set()

    async def ask_all(self, request_id: str) -> bytes | None:
        """What another router knows of a decision, as JSON; None if nobody knows it, or answers in time."""
        asked = [self._ask(record, [_EXPLAIN, request_id.encode()]) for record in self._records.values()]
        answers = await asyncio.gather(*asked)
        return next((answer for answer in answers if answer), None)

    def _bound(self, kind: int) -> tuple[zmq.asyncio.Socket, int]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.MAXMSGSIZE, _MAX_QUESTION_BYTES)
        listen_to_known(socket, self._parts.token, _CURVE_PURPOSE)
        return socket, socket.bind_to_random_port(f"tcp://{self._config.host}")

    def _connecting(self, kind: int) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES + OVERHEAD_BYTES)
        connect_to_known(socket, self._parts.token, _CURVE_PURPOSE)
        return socket

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the link to the other routers failed; what they have is forgotten in time", exc_info=error)

    async def _keep_meeting(self) -> None:
        while True:
            await asyncio.sleep(self._config.heartbeat_s)
            try:
                await self._meet()
                self._parts.peers.lapse(self._parts.clock.monotonic_s())
                self._catch_up()
            except Exception:
                # A supervisor's guard: whatever one record or one request did, the next round meets the others again.
                _log.exception("a round with the other routers failed")

    async def _meet(self) -> None:
        """Renew the own record and read the others'; without a registry those known stay."""
        try:
            await asyncio.to_thread(self._parts.registry.publish, self._record)
            records = await asyncio.to_thread(self._parts.registry.snapshot)
        except OSError as error:
            if self._is_reachable:
                _log.warning("registry unreachable, staying with the routers known: %s", error)
            self._is_reachable = False
            return
        self._is_reachable = True
        others = {record.router_id: record for record in records if record.router_id != self._record.router_id}
        self._reconnect(others)
        epochs = {router_id: record.epoch for router_id, record in others.items()}
        self._parts.peers.set_peers(epochs, self._parts.clock.monotonic_s())

    def _reconnect(self, others: dict[str, RouterRecord]) -> None:
        old = {record.loads_endpoint for record in self._records.values()}
        new = {record.loads_endpoint for record in others.values()}
        for endpoint in old - new:
            with suppress(zmq.ZMQError):
                self._subscriber.disconnect(f"tcp://{endpoint}")
        for endpoint in new - old:
            try:
                self._subscriber.connect(f"tcp://{endpoint}")
            except zmq.ZMQError as error:
                _log.warning("no news from the router at %s: %s", endpoint, error)
        self._records = others

    async def _publish(self) -> None:
        own, clock = self._parts.own, self._parts.clock
        renew_s = self._config.lease_s / _RENEWALS_PER_LEASE
        renewed_s = clock.monotonic_s()
        while True:
            try:
                await asyncio.wait_for(self._news.wait(), self._config.heartbeat_s)
                await asyncio.sleep(self._config.publish_s)
            except asyncio.TimeoutError:
                pass
            self._news.clear()
            if clock.monotonic_s() - renewed_s >= renew_s:
                renewed_s = clock.monotonic_s()
                own.renew()
            await self._publisher.send(encode(own.message()))

    async def _receive(self) -> None:
        while True:
            raw = await self._subscriber.recv()
            try:
                self._parts.peers.receive(decode(Deltas, raw), self._parts.clock.monotonic_s())
                self._catch_up()
            except ProtocolError as error:
                _log.warning("ignored: %s", error)
            except Exception:
                # A supervisor's guard: one message must not make this router deaf.
                _log.exception("a message of another router was not taken in")

    def _catch_up(self) -> None:
        for router_id in self._parts.peers.behind():
            record = self._records.get(router_id)
            if record is not None and router_id not in self._asking:
                self._asking.add(router_id)
                self._start(self._fetch_snapshot(record))

    async def _fetch_snapshot(self, record: RouterRecord) -> None:
        try:
            raw = await self._ask(record, [_SNAPSHOT])
            if raw:
                self._parts.peers.restore(decode(Snapshot, raw), self._parts.clock.monotonic_s())
        except ProtocolError as error:
            _log.warning("ignored: %s", error)
        finally:
            self._asking.discard(record.router_id)

    async def _ask(self, record: RouterRecord, question: list[bytes]) -> bytes | None:
        """A socket of its own for each question: a lost answer then blocks nothing."""
        socket = self._connecting(zmq.REQ)
        try:
            socket.connect(f"tcp://{record.answers_endpoint}")
            await socket.send_multipart(question)
            return bytes(await asyncio.wait_for(socket.recv(), _ASK_TIMEOUT_S))
        except (asyncio.TimeoutError, zmq.ZMQError):
            return None
        finally:
            socket.close(linger=0)

    async def _answer(self) -> None:
        while True:
            sender, *question = await self._answerer.recv_multipart()
            try:
                await self._answerer.send_multipart([sender, b"", self._reply(question[1:])])
            except Exception:
                # A supervisor's guard: one question must not make this router dumb.
                _log.exception("a question of another router was not answered")

    def _reply(self, question: list[bytes]) -> bytes:
        if question == [_SNAPSHOT]:
            return encode(self._parts.own.snapshot())
        if len(question) == 2 and question[0] == _EXPLAIN:
            return self._parts.explain(question[1].decode(errors="replace")) or b""
        return b""
