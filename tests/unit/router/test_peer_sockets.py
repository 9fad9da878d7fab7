"""Sockets of KV events and between routers that know a token: who knows it is served, who does not hears nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from test_replica_link import CONFIG as REPLICAS
from test_replica_link import Router, opened
from test_subscriber_feed import CONFIG, FeedRig, record_of, store

from kelp.core.clock import SystemClock
from kelp.core.metrics import Metrics
from kelp.core.peer_auth import PeerToken
from kelp.kv.events import EventPublisher
from kelp.kv.events.curve import connect_to_known, listen_to_known
from kelp.registry.directory import RouterDirectory
from kelp.router.decision.workers import WorkerTable
from kelp.router.feed.subscriber import EventFeed, FeedOptions
from kelp.router.feed.values import SubscriptionState
from kelp.router.replicas.link import LinkParts, ReplicaLink
from support.event_doubles import SetIndex
from support.waiting import until

TOKEN, OTHER = PeerToken(b"t" * 16), PeerToken(b"o" * 16)


@contextlib.contextmanager
def publishing(token: PeerToken | None) -> Iterator[EventPublisher]:
    publisher = EventPublisher("e", 1, CONFIG, SystemClock(), token)
    publisher.start()
    try:
        yield publisher
    finally:
        publisher.close()


@contextlib.asynccontextmanager
async def feeding(token: PeerToken | None, allow_foreign: bool = False) -> AsyncIterator[FeedRig]:
    table, index, metrics = WorkerTable(), SetIndex(), Metrics()
    options = FeedOptions(ttl_s=60.0, token=token, allow_foreign=allow_foreign)
    feed = EventFeed(table, index, CONFIG, metrics, SystemClock(), options)  # type: ignore[arg-type]
    await feed.start()
    try:
        yield FeedRig(table, index, metrics, feed)
    finally:
        await feed.stop()


def test_events_and_snapshots_reach_a_router_that_knows_the_token() -> None:
    async def scene() -> None:
        with publishing(TOKEN) as publisher:
            store(publisher, 1, 2)
            async with feeding(TOKEN) as rig:
                rig.table.update([record_of(publisher).model_copy(update={"asks_token": True})])
                await rig.holds(1, 2)
                await rig.is_in(SubscriptionState.LIVE)
                store(publisher, 3)
                await rig.holds(1, 2, 3)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("of_worker", "of_router", "what"),
    [
        (TOKEN, None, "it asks for the peers' token, and here is none"),
        (None, TOKEN, "it asks for none, and here is one"),
    ],
    ids=["router without", "worker without"],
)
def test_a_worker_that_cannot_be_believed_or_heard_is_guessed_and_named(
    of_worker: PeerToken | None, of_router: PeerToken | None, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        with publishing(of_worker) as publisher:
            async with feeding(of_router) as rig:
                rig.table.update([record_of(publisher).model_copy(update={"asks_token": of_worker is not None})])
                assert rig.feed.state(0) is SubscriptionState.APPROXIMATE
                assert what in caplog.text

    asyncio.run(scene())


def test_engines_that_know_no_token_are_followed_where_that_is_allowed() -> None:
    async def scene() -> None:
        with publishing(None) as publisher:
            store(publisher, 1)
            async with feeding(TOKEN, allow_foreign=True) as rig:
                rig.table.update([record_of(publisher)])
                await rig.holds(1)

    asyncio.run(scene())


@pytest.mark.parametrize("of_client", [None, OTHER], ids=["nothing", "another token"])
def test_who_does_not_know_the_token_gets_no_connection(of_client: PeerToken | None) -> None:
    async def scene() -> None:
        context = zmq.asyncio.Context()
        listening, connecting, known = (context.socket(kind) for kind in (zmq.ROUTER, zmq.DEALER, zmq.DEALER))
        listen_to_known(listening, TOKEN, "x")
        connect_to_known(connecting, of_client, "x")
        connect_to_known(known, TOKEN, "x")
        monitor = listening.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        try:
            port = listening.bind_to_random_port("tcp://127.0.0.1")
            connecting.connect(f"tcp://127.0.0.1:{port}")
            await connecting.send(b"from a stranger")
            await asyncio.wait_for(monitor.recv_multipart(), 20.0)
            known.connect(f"tcp://127.0.0.1:{port}")
            await known.send(b"from a peer")
            heard = await asyncio.wait_for(listening.recv_multipart(), 20.0)
            assert heard[1:] == [b"from a peer"]
        finally:
            listening.disable_monitor()
            context.destroy(linger=0)

    asyncio.run(scene())


def known_router(name: str, folder: Path, token: PeerToken | None) -> Router:
    router = Router(name, folder)
    registry = RouterDirectory(folder, 60.0)
    parts = LinkParts(router.own, router.peers, registry, SystemClock(), router.explain, token)
    router.link = ReplicaLink(parts, REPLICAS)
    return router


def test_routers_that_know_the_token_tell_and_ask_each_other(tmp_path: Path) -> None:
    async def scene() -> None:
        one, other = known_router("one", tmp_path, TOKEN), known_router("other", tmp_path, TOKEN)
        async with opened(one, other):
            other.add("r")
            await until(lambda: len(one.sink.running) == 1, "the request")
            other.knows["r"] = b"{}"
            await until(lambda: one.peers.num_peers == 1 and not one.peers.behind(), "the two to meet")
            assert await one.link.ask_all("r") == b"{}"

    asyncio.run(scene())


def test_a_router_that_knows_another_token_is_told_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kelp.router.replicas.link._ASK_TIMEOUT_S", 0.2)

    async def scene() -> None:
        one, other = known_router("one", tmp_path, TOKEN), known_router("other", tmp_path, OTHER)
        async with opened(one, other):
            other.add("r")
            other.knows["r"] = b"{}"
            await until(lambda: one.peers.num_peers == 1, "the record")
            assert await one.link.ask_all("r") is None
            assert one.sink.running == set()

    asyncio.run(scene())
