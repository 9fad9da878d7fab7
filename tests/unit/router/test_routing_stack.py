"""What keeps the decision informed, put together: workers that tell nothing are guessed, and metrics say so."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kelp.core.clock import SystemClock
from kelp.core.config import EventsConfig, KelpConfig
from kelp.core.kv_events import BlocksStored
from kelp.core.metrics import APPROXIMATE_WORKERS, KV_EVENT_MANAGERS, KV_EVENT_WORKERS, Metrics
from kelp.core.types import Tier
from kelp.kv.events import EventPublisher
from kelp.registry.base import KvManagerRecord
from kelp.registry.directory import KvManagerDirectory, RouterDirectory
from kelp.registry.memory import MemoryRegistry
from kelp.registry.view import RecordsView, RegistryView
from kelp.router.decision.request import RoutingRequest
from kelp.router.stack import Registries, RoutingStack
from support.selector_rig import hashes, worker
from support.waiting import until

NAMES = hashes(*range(10))
CONFIG = KelpConfig.model_validate({"events": {"flush_interval_s": 0.001, "digest_interval_s": 0.05}})


def test_workers_without_events_or_behind_on_them_live_on_expectations_and_count_as_approximate(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock, metrics = SystemClock(), Metrics()
        registry = MemoryRegistry(600.0, clock)
        registry.publish(worker("silent"))
        registry.publish(worker("unreachable", events_endpoint="127.0.0.1:9", replay_endpoint="127.0.0.1:9"))
        managers = RecordsView(KvManagerDirectory(tmp_path, 5.0).snapshot, 0.05)
        registries = Registries(RegistryView(registry, 0.05), managers, RouterDirectory(tmp_path, 5.0))
        stack = RoutingStack(CONFIG, "r", registries, clock, metrics)
        await stack.start()
        for name in ("silent", "unreachable"):
            request = RoutingRequest(161, NAMES, request_id=name, pinned_worker=name)
            stack.selector.reserve(stack.selector.select(request))
        found = stack.index.match(NAMES)
        assert found.blocks[:, -1].tolist() == found.predicted.tolist() == [10, 10]

        publisher = EventPublisher("1", 16, EventsConfig(), clock)
        publisher.start()
        publisher.sink(BlocksStored(NAMES, None))
        addresses = {"events_endpoint": publisher.endpoint, "replay_endpoint": publisher.replay_endpoint}
        registry.publish(worker("live", **addresses))

        def gauges() -> dict[str, float]:
            found = metrics.take()[1]
            states = {
                state: found.get((KV_EVENT_WORKERS, (("router", "r"), ("state", state))), 0.0)
                for state in ("live", "recovering", "approximate")
            }
            return {**states, "all": found.get((APPROXIMATE_WORKERS, (("router", "r"),)), 0)}

        expected = {"live": 1, "recovering": 1, "approximate": 1, "all": 2}
        await until(lambda: gauges() == expected, "the gauges")
        assert sorted(stack.index.match(NAMES).predicted.tolist()) == [0, 10, 10]
        await stack.stop()
        publisher.close()

    asyncio.run(scenario())


def test_a_managers_blocks_are_found_for_its_workers_and_told_to_them_once_both_are_known_whole(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock, metrics = SystemClock(), Metrics()
        publishers = {name: EventPublisher("1", 16, CONFIG.events, clock) for name in ("w", "m")}
        for publisher in publishers.values():
            publisher.start()
        publishers["w"].sink(BlocksStored(NAMES[:2], None))
        publishers["m"].sink(BlocksStored(NAMES[:5], None, Tier.HOST))
        addresses = {
            name: {"events_endpoint": publisher.endpoint, "replay_endpoint": publisher.replay_endpoint}
            for name, publisher in publishers.items()
        }
        registry, directory = MemoryRegistry(600.0, clock), KvManagerDirectory(tmp_path, 600.0)
        registry.publish(worker("w", kv_manager_id="m", **addresses["w"]))
        managers = RecordsView(directory.snapshot, 0.05)
        registries = Registries(RegistryView(registry, 0.05), managers, RouterDirectory(tmp_path, 5.0))
        stack = RoutingStack(CONFIG, "r", registries, clock, metrics)
        await stack.start()

        def found() -> tuple[list[list[int]], int | None]:
            decision = stack.selector.select(RoutingRequest(161, NAMES, request_id="x"))
            return stack.index.match(NAMES).blocks.tolist(), decision.known_blocks

        await until(lambda: found() == ([[2, 2, 2, 2]], None), "the worker's own blocks")
        record = KvManagerRecord(
            manager_id="m", epoch="1", host="h", endpoint="127.0.0.1:1", model_name="m", **addresses["m"]
        )
        directory.publish(record)
        await until(lambda: found() == ([[2, 5, 5, 5]], 5), "the manager's blocks")
        live = (KV_EVENT_MANAGERS, (("router", "r"), ("state", "live")))
        await until(lambda: metrics.take()[1].get(live) == 1, "the gauge")
        directory.withdraw("m", "1")
        await until(lambda: found() == ([[2, 2, 2, 2]], None), "the manager's blocks being forgotten")
        await stack.stop()
        for publisher in publishers.values():
            publisher.close()

    asyncio.run(scenario())
