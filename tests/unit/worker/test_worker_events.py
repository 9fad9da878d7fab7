"""A worker tells what its cache holds, where it stands, and stops telling when it stops."""

from __future__ import annotations

import asyncio
import threading

import zmq
from worker_rig import FakeExecutor, open_worker

from kelp.core.clock import SystemClock
from kelp.core.config import EventsConfig
from kelp.core.kv_events import BlocksStored, KVEventSink
from kelp.kv.events import EventPublisher
from kelp.kv.events.codec import decode_own
from kelp.kv.events.frames import SNAPSHOT_REQUEST
from support.event_doubles import digest16


class WatchedExecutor(FakeExecutor):
    """Keeps the sink."""

    def watch_kv(self, sink: KVEventSink) -> None:
        self.sink = sink


def snapshot(endpoint: str) -> object:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, 10_000)
        dealer.connect(f"tcp://{endpoint}")
        dealer.send_multipart([b"", SNAPSHOT_REQUEST])
        return decode_own(dealer.recv_multipart()[3], 1 << 20).events


def test_a_worker_publishes_what_its_executor_reports_and_announces_where() -> None:
    async def scenario() -> None:
        executor = WatchedExecutor()
        events = EventPublisher("epoch", 4, EventsConfig(), SystemClock())
        async with open_worker(executor=executor, events=events, tags={"zone": "a"}) as rig:
            record = rig.registry.published[0]
            assert (record.events_endpoint, record.replay_endpoint) == (events.endpoint, events.replay_endpoint)
            assert (record.max_step_tokens, record.max_running, record.tags) == (512, 64, {"zone": "a"})
            executor.sink(BlocksStored((digest16(1),), None))
            assert await asyncio.to_thread(snapshot, record.replay_endpoint) == (BlocksStored((digest16(1),), None),)
        assert not [thread for thread in threading.enumerate() if thread.name == "kelp-kv-events"]

    asyncio.run(scenario())


def test_a_worker_without_events_says_so() -> None:
    async def scenario() -> None:
        async with open_worker() as rig:
            assert rig.registry.published[0].events_endpoint == ""

    asyncio.run(scenario())
