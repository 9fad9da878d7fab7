"""The feed over real sockets, with real publishers behind it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import psutil
import zmq

from kelp.core.clock import SystemClock
from kelp.core.config import EventsConfig
from kelp.core.kv_events import BlocksRemoved, BlocksStored
from kelp.core.metrics import (
    KV_EVENT_BLOCKS,
    KV_EVENT_DROPPED,
    KV_EVENT_RECOVERIES,
    Metrics,
)
from kelp.core.types import Role, Tier, WorkerState
from kelp.kv.events import EventPublisher
from kelp.registry.base import LayoutRecord, WorkerRecord
from kelp.router.decision.workers import WorkerTable
from kelp.router.feed.subscriber import EventFeed, FeedOptions
from kelp.router.feed.values import SubscriptionState
from kelp.router.index.kv_index import KVIndex
from support.event_doubles import ForeignEngine, SetIndex, digest16
from support.waiting import until

CONFIG = EventsConfig(
    flush_interval_s=0.001, digest_interval_s=0.05, request_timeout_s=1.0, max_backoff_s=1.0, audit_interval_s=0.2
)
LAYOUT = LayoutRecord(
    num_blocks=64, num_layers=1, num_kv_heads=1, block_size=1, head_dim=2, dtype="float32", model_id="m"
)


def record(worker_id: str = "w", epoch: str = "e", events: str = "", replay: str = "") -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id,
        epoch=epoch,
        model_name="m",
        role=Role.DECODE,
        state=WorkerState.READY,
        endpoint="host:1",
        layout=LAYOUT,
        events_endpoint=events,
        replay_endpoint=replay,
    )


def record_of(publisher: EventPublisher, worker_id: str = "w", epoch: str = "e") -> WorkerRecord:
    return record(worker_id, epoch, publisher.endpoint, publisher.replay_endpoint)


@contextlib.contextmanager
def publishing(epoch: str = "e", **config: object) -> Iterator[EventPublisher]:
    settings = EventsConfig.model_validate({**CONFIG.model_dump(), **config})
    publisher = EventPublisher(epoch, 1, settings, SystemClock())
    publisher.start()
    try:
        yield publisher
    finally:
        publisher.close()


@dataclass
class FeedRig:
    table: WorkerTable
    index: SetIndex
    metrics: Metrics
    feed: EventFeed

    async def holds(self, *blocks: int, slot: int = 0) -> None:
        expected = frozenset((Tier.DEVICE, digest16(block)) for block in blocks)
        await until(lambda: self.index.held(slot) == expected, f"slot {slot} with {blocks}")

    async def is_in(self, state: SubscriptionState, slot: int = 0) -> None:
        await until(lambda: self.feed.state(slot) is state, f"slot {slot} being {state.value}")


@contextlib.asynccontextmanager
async def feeding(config: EventsConfig = CONFIG, ttl_s: float = 60.0) -> AsyncIterator[FeedRig]:
    table, index, metrics = WorkerTable(), SetIndex(), Metrics()
    options = FeedOptions(ttl_s=ttl_s)
    feed = EventFeed(table, index, config, metrics, SystemClock(), options)  # type: ignore[arg-type]
    await feed.start()
    try:
        yield FeedRig(table, index, metrics, feed)
    finally:
        await feed.stop()


def store(publisher: EventPublisher, *blocks: int) -> None:
    for block in blocks:
        publisher.sink(BlocksStored((digest16(block),), None))


def test_what_a_worker_held_before_and_what_changes_later_reaches_the_index() -> None:
    async def scenario() -> None:
        with publishing() as publisher:
            store(publisher, 1, 2, 3)
            async with feeding() as rig:
                rig.table.update([record_of(publisher)])
                assert rig.feed.state(0) is SubscriptionState.RECOVERING
                await rig.holds(1, 2, 3)
                await rig.is_in(SubscriptionState.LIVE)
                publisher.sink(BlocksRemoved((digest16(2),)))
                store(publisher, 4)
                await rig.holds(1, 3, 4)

    asyncio.run(scenario())


def test_each_worker_fills_its_own_slot_and_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        with publishing("a") as first, publishing("b") as second:
            store(first, 1)
            store(second, 2)
            async with feeding() as rig:
                rig.table.update([record_of(first, "v", "a"), record_of(second, "w", "b")])
                await rig.holds(1, slot=0)
                await rig.holds(2, slot=1)
                rig.table.update([record_of(second, "w", "b")])
                assert rig.index.held(0) == frozenset()
                await rig.holds(2, slot=1)

    asyncio.run(scenario())


def test_a_restarted_worker_starts_with_nothing() -> None:
    async def scenario() -> None:
        async with feeding() as rig:
            with publishing("a") as first:
                store(first, 1)
                rig.table.update([record_of(first, epoch="a")])
                await rig.holds(1)
            with publishing("b") as second:
                rig.table.update([record_of(second, epoch="b")])
                slot = rig.table.slots()[0]
                await rig.is_in(SubscriptionState.LIVE, slot)
                assert rig.index.held(slot) == frozenset()
                store(second, 2)
                await rig.holds(2, slot=slot)

    asyncio.run(scenario())


def test_batches_lost_on_the_way_are_asked_for_again() -> None:
    async def scenario() -> None:
        with publishing(drop_share=0.5) as publisher:
            async with feeding() as rig:
                rig.table.update([record_of(publisher)])
                await rig.is_in(SubscriptionState.LIVE)
                for block in range(40):
                    before = publisher._stream.last_seq
                    store(publisher, block)
                    await until(lambda seq=before: publisher._stream.last_seq > seq)  # type: ignore[misc]
                await rig.holds(*range(40))
                await rig.is_in(SubscriptionState.LIVE)
                rig.table.update([])
                counters, _, _ = rig.metrics.take()

        assert counters[KV_EVENT_RECOVERIES, (("kind", "replay"),)] > 0
        assert counters[KV_EVENT_RECOVERIES, (("kind", "snapshot"),)] == 1

    asyncio.run(scenario())


def test_a_publisher_that_goes_silent_is_noticed_and_its_next_incarnation_followed() -> None:
    async def scenario() -> None:
        async with feeding() as rig:
            with publishing() as publisher:
                store(publisher, 1)
                addressed = record_of(publisher)
                rig.table.update([addressed])
                await rig.holds(1)
            await rig.is_in(SubscriptionState.RECOVERING)
            endpoints = (addressed.events_endpoint, addressed.replay_endpoint)
            ports = [int(endpoint.rpartition(":")[2]) for endpoint in endpoints]
            with publishing("f", port=ports[0], replay_port=ports[1]) as again:
                store(again, 1, 2)
                rig.table.update([record_of(again, epoch="f")])
                slot = rig.table.slot(("w", "f"))
                assert slot is not None
                await rig.holds(1, 2, slot=slot)
                await rig.is_in(SubscriptionState.LIVE, slot)

    asyncio.run(scenario())


def test_blocks_of_a_worker_whose_publisher_has_died_are_forgotten_until_there_is_one_again() -> None:
    impatient = EventsConfig.model_validate({**CONFIG.model_dump(), "request_timeout_s": 0.1, "max_backoff_s": 0.1})

    async def scenario() -> None:
        async with feeding(impatient, ttl_s=0.5) as rig:
            with publishing() as publisher:
                store(publisher, 1, 2)
                addressed = record_of(publisher)
                rig.table.update([addressed])
                await rig.holds(1, 2)
            await rig.holds()
            await rig.is_in(SubscriptionState.APPROXIMATE)
            rig.index.apply(0, BlocksStored((digest16(9),), None))
            ports = [
                int(endpoint.rpartition(":")[2]) for endpoint in (addressed.events_endpoint, addressed.replay_endpoint)
            ]
            with publishing(port=ports[0], replay_port=ports[1]) as again:
                store(again, 3)
                await rig.holds(3)
                await rig.is_in(SubscriptionState.LIVE)
            rig.table.update([])
            counters, _, _ = rig.metrics.take()
            assert counters[KV_EVENT_RECOVERIES, (("kind", "lost"),)] == 1

    asyncio.run(scenario())


def test_workers_that_do_not_publish_are_approximate() -> None:
    async def scenario() -> None:
        with publishing() as publisher:
            async with feeding() as rig:
                rig.table.update([record("silent"), record_of(publisher)])
                publishing_slot = rig.table.slot(("w", "e"))
                silent_slot = rig.table.slot(("silent", "e"))
                assert publishing_slot is not None and silent_slot is not None
                await rig.is_in(SubscriptionState.LIVE, publishing_slot)
                assert rig.feed.state(silent_slot) is SubscriptionState.APPROXIMATE
                assert list(rig.feed.num_workers().values()) == [1, 0, 1]

    asyncio.run(scenario())


def test_what_is_known_of_a_silent_worker_by_prediction_is_left_alone() -> None:
    async def scenario() -> None:
        async with feeding() as rig:
            rig.table.update([record()])
            rig.index.apply(0, BlocksStored((digest16(1),), None))
            with publishing("later") as publisher:
                # Both kinds of worker are looked after on one tick.
                rig.table.update([record(), record_of(publisher, "v", "later")])
                rig.table.update([record(), record("v", "later")])
                await rig.is_in(SubscriptionState.APPROXIMATE, rig.table.slots()[0])
            await rig.holds(1)

    asyncio.run(scenario())


def test_with_events_disabled_nobody_is_asked() -> None:
    async def scenario() -> None:
        with publishing() as publisher:
            async with feeding(EventsConfig(enabled=False)) as rig:
                rig.table.update([record_of(publisher)])
                assert rig.feed.num_workers()[SubscriptionState.APPROXIMATE] == 1

    asyncio.run(scenario())


def test_an_endpoint_that_a_worker_announces_late_is_followed() -> None:
    async def scenario() -> None:
        with publishing() as publisher:
            store(publisher, 1)
            async with feeding() as rig:
                rig.table.update([record()])
                rig.table.update([record_of(publisher)])
                await rig.holds(1)

    asyncio.run(scenario())


def test_a_worker_with_an_impossible_address_is_approximate_and_keeps_nobody_else_from_being_followed() -> None:
    async def scenario() -> None:
        with publishing() as publisher:
            store(publisher, 1, 2)
            async with feeding() as rig:
                impossible = record("a").model_copy(update={"events_endpoint": "no address"})
                rig.table.update([impossible, record_of(publisher, "b")])
                slot = rig.table.slot(("b", "e"))
                assert slot is not None
                await rig.holds(1, 2, slot=slot)
                assert rig.feed.num_workers()[SubscriptionState.APPROXIMATE] == 1
                rig.table.update([record_of(publisher, "a"), record_of(publisher, "b")])
                await rig.holds(1, 2, slot=1 - slot)

    asyncio.run(scenario())


def test_an_index_that_fails_is_filled_anew() -> None:
    async def scenario() -> None:
        with publishing() as publisher:
            store(publisher, 1)
            async with feeding() as rig:
                rig.table.update([record_of(publisher)])
                await rig.holds(1)
                rig.index.error = RuntimeError("a bug")
                store(publisher, 2)
                await rig.is_in(SubscriptionState.APPROXIMATE)
                rig.index.error = None
                await rig.holds(1, 2)

    asyncio.run(scenario())


def test_events_reach_the_real_index() -> None:
    async def scenario() -> None:
        table, index = WorkerTable(), KVIndex(SystemClock())
        feed = EventFeed(table, index, CONFIG, Metrics(), SystemClock())
        await feed.start()
        with publishing() as publisher:
            table.update([record_of(publisher)])
            publisher.sink(BlocksStored(tuple(map(digest16, range(600))), None))
            await until(lambda: index.match(list(map(digest16, range(700)))).blocks[:, 0].tolist() == [600])
            await feed.stop()

    asyncio.run(scenario())


class ForeignServer:
    """A foreign engine's sockets, played by the test's own thread of control."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], ring: int = 1000) -> None:
        self.engine = ForeignEngine(1.0, ring)
        self.pub, self.router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        for bound in (self.pub, self.router):
            bound.setsockopt(zmq.LINGER, 0)
        ports = [bound.bind_to_random_port("tcp://127.0.0.1") for bound in (self.pub, self.router)]
        self.record = record(events=f"127.0.0.1:{ports[0]}", replay=f"127.0.0.1:{ports[1]}")

    async def serve(self) -> None:
        while True:
            with contextlib.suppress(zmq.Again):
                address, empty, request = self.router.recv_multipart(zmq.NOBLOCK)
                for frames in self.engine.replay(int.from_bytes(request, "big")):
                    self.router.send_multipart([address, empty, *frames])
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def foreign_engine(ring: int = 1000) -> AsyncIterator[ForeignServer]:
    with zmq.Context() as context:
        server = ForeignServer(context, ring)
        serving = asyncio.ensure_future(server.serve())
        try:
            yield server
        finally:
            serving.cancel()
            server.pub.close()
            server.router.close()


def test_a_foreign_engine_is_followed_in_our_names() -> None:
    async def scenario() -> None:
        async with foreign_engine() as server, feeding() as rig:
            engine = server.engine
            engine.store(1, None)
            rig.table.update([server.record])
            await until(lambda: rig.index.held() == engine.truth() != frozenset())
            server.pub.send_multipart(engine.store(2, 1))
            engine.remove(1)
            server.pub.send_multipart(engine.store(3, 2))
            await until(lambda: rig.index.held() == engine.truth())
            await rig.is_in(SubscriptionState.LIVE)

    asyncio.run(scenario())


def test_garbage_is_counted_and_harms_nobody() -> None:
    async def scenario() -> None:
        async with foreign_engine() as server, feeding() as rig:
            rig.table.update([server.record])
            await rig.is_in(SubscriptionState.LIVE)
            engine = server.engine
            zero = bytes(8)
            for frames in ([b""], [b"", b"seq", b""], [b"kelp-kv/other", zero, b""], [b"kelp-digest/e", zero, b""]):
                server.pub.send_multipart(frames)
            server.pub.send_multipart(engine.store(1, None))
            await until(lambda: rig.index.held() == engine.truth())
            await until(lambda: (KV_EVENT_DROPPED, (("kind", "epoch"),)) in rig.metrics.take()[0])

    asyncio.run(scenario())


def test_stopping_leaves_no_task_thread_or_descriptor() -> None:
    async def scenario(publisher: EventPublisher) -> None:
        async with feeding() as rig:
            rig.table.update([record_of(publisher)])
            await rig.is_in(SubscriptionState.LIVE)
        await rig.feed.stop()
        rig.table.update([])
        assert len(asyncio.all_tasks()) == 1

    process = psutil.Process()
    with publishing() as publisher:
        asyncio.run(scenario(publisher))
        num_descriptors, threads = process.num_fds(), set(threading.enumerate())
        for _ in range(3):
            asyncio.run(scenario(publisher))
        assert set(threading.enumerate()) == threads
        # The publisher may still hold the last connection that was closed.
        assert process.num_fds() <= num_descriptors + 2


def test_counters_tell_blocks_and_reasons() -> None:
    async def scenario() -> None:
        with publishing() as publisher:
            async with feeding() as rig:
                rig.table.update([record_of(publisher)])
                store(publisher, 1, 2)
                await rig.holds(1, 2)
                publisher.sink(BlocksRemoved((digest16(1),)))
                await rig.holds(2)
                rig.table.update([])
                counters, _, _ = rig.metrics.take()
        assert counters[KV_EVENT_BLOCKS, (("kind", "stored"),)] == 2
        assert counters[KV_EVENT_BLOCKS, (("kind", "removed"),)] == 1
        assert (KV_EVENT_DROPPED, (("kind", "malformed"),)) not in counters

    asyncio.run(scenario())
