"""Routers that find each other through a registry and talk over real loopback sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kelp.core.clock import SystemClock
from kelp.core.config_replicas import ReplicasConfig
from kelp.registry.base import RouterRecord
from kelp.registry.directory import RouterDirectory
from kelp.router.replicas.link import LinkParts, ReplicaLink
from kelp.router.replicas.loads import OwnLoads, PeerLoads
from kelp.router.replicas.messages import ActiveLoad
from support.waiting import until

CONFIG = ReplicasConfig(heartbeat_s=0.02, publish_s=0.001, lease_s=60.0, stale_s=30.0)


class Sink:
    """Counts what is known of others."""

    def __init__(self) -> None:
        self.running: set[str] = set()

    def peer_added(self, peer_id: str, load: ActiveLoad) -> None:
        self.running.add(peer_id)

    def peer_prefilled(self, peer_id: str) -> None:
        pass

    def peer_renewed(self, peer_id: str) -> None:
        pass

    def peer_freed(self, peer_id: str) -> None:
        self.running.remove(peer_id)


class Router:
    def __init__(self, name: str, folder: Path, config: ReplicasConfig = CONFIG, epoch: int = 1) -> None:
        self.own = OwnLoads(name, epoch)
        self.sink = Sink()
        self.peers = PeerLoads(self.sink, config.lease_s, config.stale_s)
        registry = RouterDirectory(folder, 60.0)
        self.link = ReplicaLink(LinkParts(self.own, self.peers, registry, SystemClock(), self.explain), config)
        self.knows: dict[str, bytes] = {}

    def explain(self, request_id: str) -> bytes | None:
        return self.knows.get(request_id)

    def add(self, request_id: str) -> None:
        self.own.add(ActiveLoad(request_id, ("w", "1")))
        self.link.notify()

    def free(self, request_id: str) -> None:
        self.own.free(request_id)
        self.link.notify()


@contextlib.asynccontextmanager
async def opened(*routers: Router) -> AsyncIterator[None]:
    for router in routers:
        await router.link.start()
    try:
        yield
    finally:
        for router in routers:
            await router.link.stop()


def test_a_router_hears_what_another_has_and_when_it_ends(tmp_path: Path) -> None:
    async def scene() -> None:
        one, other = Router("one", tmp_path), Router("other", tmp_path)
        async with opened(one, other):
            await until(lambda: one.peers.num_peers == 1 and not one.peers.behind(), "the two to meet")
            other.add("r")
            await until(lambda: one.sink.running == {"\0other|r"}, "the request to be known")
            other.free("r")
            await until(lambda: not one.sink.running, "its end to be known")

    asyncio.run(scene())


def test_a_router_that_joins_late_learns_what_runs(tmp_path: Path) -> None:
    async def scene() -> None:
        one = Router("one", tmp_path)
        async with opened(one):
            one.add("r")
            await until(lambda: not one.own.has_news, "the news to be sent to nobody")
            late = Router("late", tmp_path)
            async with opened(late):
                await until(lambda: late.sink.running == {"\0one|r"}, "the request to be known")
                assert late.link.num_stale == 0

    asyncio.run(scene())


def test_a_router_that_leaves_takes_its_requests_with_it(tmp_path: Path) -> None:
    async def scene() -> None:
        one, other = Router("one", tmp_path), Router("other", tmp_path)
        async with opened(one):
            async with opened(other):
                other.add("r")
                await until(lambda: one.sink.running == {"\0other|r"}, "the request to be known")
            await until(lambda: not one.sink.running and one.peers.num_peers == 0, "all of it to be forgotten")

    asyncio.run(scene())


def test_a_restarted_router_starts_over(tmp_path: Path) -> None:
    async def scene() -> None:
        one, before = Router("one", tmp_path), Router("other", tmp_path)
        async with opened(one):
            async with opened(before):
                before.add("old")
                await until(lambda: one.sink.running == {"\0other|old"}, "the old request to be known")
            after = Router("other", tmp_path, epoch=2)
            async with opened(after):
                after.add("new")
                await until(lambda: one.sink.running == {"\0other|new"}, "the new request alone to be known")

    asyncio.run(scene())


def test_a_decision_is_found_at_whichever_router_made_it(tmp_path: Path) -> None:
    async def scene() -> None:
        routers = [Router(name, tmp_path) for name in ("a", "b", "c")]
        routers[2].knows["r"] = b"{}"
        async with opened(*routers):
            await until(lambda: routers[0].peers.num_peers == 2, "all to meet")
            assert await routers[0].link.ask_all("r") == b"{}"
            assert await routers[0].link.ask_all("unknown") is None

    asyncio.run(scene())


def test_a_silent_router_turns_stale(tmp_path: Path) -> None:
    async def scene() -> None:
        impatient = ReplicasConfig(heartbeat_s=0.02, stale_s=0.1)
        one = Router("one", tmp_path, impatient)
        nobody = RouterRecord(router_id="dead", epoch=1, loads_endpoint="127.0.0.1:9", answers_endpoint="127.0.0.1:9")
        RouterDirectory(tmp_path, 60.0).publish(nobody)
        async with opened(one):
            await until(lambda: one.link.num_stale == 1, "the dead one to be noticed")

    asyncio.run(scene())


def test_a_router_that_fails_on_one_question_answers_the_next(tmp_path: Path) -> None:
    class Forgetful(Router):
        def explain(self, request_id: str) -> bytes | None:
            if request_id == "bad":
                raise RuntimeError("cannot say")
            return b"{}"

    async def scene() -> None:
        one, other = Router("one", tmp_path), Forgetful("other", tmp_path)
        async with opened(one, other):
            await until(lambda: one.peers.num_peers == 1, "the two to meet")
            assert await one.link.ask_all("bad") is None
            assert await one.link.ask_all("good") == b"{}"

    asyncio.run(scene())


class LostRegistry:
    """Cannot be reached."""

    def publish(self, record: RouterRecord) -> None:
        raise OSError("gone")

    def withdraw(self, router_id: str, epoch: int) -> None:
        raise OSError("gone")

    def snapshot(self) -> list[RouterRecord]:
        raise OSError("gone")


def test_a_lost_registry_is_said_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        router = Router("one", tmp_path)
        parts = LinkParts(router.own, router.peers, LostRegistry(), SystemClock(), router.explain)
        link = ReplicaLink(parts, CONFIG)
        await link.start()
        router.own.add(ActiveLoad("r", ("w", "1")))
        link.notify()
        await until(lambda: not router.own.has_news, "the news to be sent")
        await asyncio.sleep(5 * CONFIG.heartbeat_s)
        await link.stop()

    asyncio.run(scene())
    assert [record.getMessage() for record in caplog.records] == [
        "registry unreachable, staying with the routers known: gone",
        "record one not withdrawn, it expires: gone",
    ]
