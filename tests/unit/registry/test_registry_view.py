"""What a router knows of the workers, whatever becomes of the registry."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
from test_directory_registry import record

from kelp.core.clock import FakeClock
from kelp.core.types import WorkerState
from kelp.registry.base import WorkerRecord
from kelp.registry.view import RegistryView


class FakeRegistry:
    """`registry.base.Registry` over a list that may be out of reach."""

    def __init__(self, *records: WorkerRecord) -> None:
        self.records = list(records)
        self.error: OSError | None = None
        self.num_snapshots = 0

    def publish(self, record: WorkerRecord) -> None:
        raise NotImplementedError

    def withdraw(self, worker_id: str, epoch: str) -> None:
        raise NotImplementedError

    def snapshot(self) -> list[WorkerRecord]:
        self.num_snapshots += 1
        if self.error is not None:
            raise self.error
        return list(self.records)


def refreshed(registry: FakeRegistry) -> RegistryView:
    view = RegistryView(registry, refresh_s=0.001)
    asyncio.run(view.refresh())
    return view


def test_only_ready_workers_get_requests_in_a_stable_order() -> None:
    states = {"b": WorkerState.READY, "a": WorkerState.READY, "s": WorkerState.STARTING, "d": WorkerState.DRAINING}
    view = refreshed(FakeRegistry(*(record(name, state=state) for name, state in states.items())))
    assert [ready.model_name for ready in view.ready()] == ["a", "b"]


def test_a_draining_worker_is_alive() -> None:
    draining = record(state=WorkerState.DRAINING)
    assert refreshed(FakeRegistry(draining)).is_alive(draining.worker_id, draining.epoch)


def test_another_incarnation_is_not_the_worker_that_was_chosen() -> None:
    view = refreshed(FakeRegistry(record(epoch="e2")))
    assert not view.is_alive(record().worker_id, "e1")
    assert view.is_alive(record().worker_id, "e2")


def test_a_worker_that_is_not_registered_is_not_alive() -> None:
    assert not refreshed(FakeRegistry()).is_alive(record().worker_id, "e1")


def test_workers_come_and_go_with_each_refresh() -> None:
    registry = FakeRegistry(record("a"))
    view = refreshed(registry)
    registry.records = [record("b")]
    asyncio.run(view.refresh())
    assert [ready.model_name for ready in view.ready()] == ["b"]


def test_the_last_snapshot_stays_in_force_while_the_registry_is_out_of_reach(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = FakeRegistry(record("a"))
    view = refreshed(registry)
    registry.error = PermissionError("no")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            asyncio.run(view.refresh())
    assert [ready.model_name for ready in view.ready()] == ["a"]
    assert view.is_alive(record("a").worker_id, "e1")
    assert caplog.text.count("registry unreachable") == 1, "said once, not at every refresh"


def test_a_registry_that_comes_back_is_believed_again() -> None:
    registry = FakeRegistry(record("a"))
    view = refreshed(registry)
    registry.error = OSError("gone for a minute")
    asyncio.run(view.refresh())
    registry.error, registry.records = None, [record("b")]
    asyncio.run(view.refresh())
    assert [ready.model_name for ready in view.ready()] == ["b"]


def test_after_an_outage_those_who_could_not_renew_their_records_count_for_a_while_longer() -> None:
    registry, clock = FakeRegistry(record("a"), record("b"), record("c")), FakeClock()
    view = RegistryView(registry, refresh_s=0.001, grace_s=5.0, clock=clock)

    def seen() -> dict[str, str]:
        asyncio.run(view.refresh())
        return {known.model_name: known.epoch for known in view.ready()}

    assert seen() == {"a": "e1", "b": "e1", "c": "e1"}
    registry.records = [record("a"), record("b")]
    assert "c" not in seen(), "without an outage there is no grace"
    registry.error = OSError("gone for a minute")
    seen()
    registry.error, registry.records = None, [record("b", epoch="e2")]
    assert seen() == {"a": "e1", "b": "e2"}
    clock.advance(4.9)
    registry.records = [record("a", epoch="e3"), record("b", epoch="e2")]
    assert seen() == {"a": "e3", "b": "e2"}
    registry.records = [record("b", epoch="e2")]
    clock.advance(0.2)
    assert seen() == {"b": "e2"}


def test_a_running_view_keeps_reading_through_outages() -> None:
    async def scene() -> None:
        registry = FakeRegistry(record("a"))
        registry.error = OSError("not yet")
        view = RegistryView(registry, refresh_s=0.001)
        running = asyncio.ensure_future(view.run())
        while registry.num_snapshots < 3:
            await asyncio.sleep(0.001)
        registry.error = None
        while not view.ready():
            await asyncio.sleep(0.001)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(asyncio.wait_for(scene(), 10.0))


def test_a_running_view_survives_whoever_fails_on_its_news() -> None:
    async def scene() -> None:
        registry = FakeRegistry(record("a"))
        view = RegistryView(registry, refresh_s=0.001)
        num_told = 0

        def fail() -> None:
            nonlocal num_told
            num_told += 1
            raise RuntimeError("not these workers")

        view.on_read = fail
        running = asyncio.ensure_future(view.run())
        while num_told < 3:
            await asyncio.sleep(0.001)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(asyncio.wait_for(scene(), 10.0))


class SlowRegistry(FakeRegistry):
    """Answers when it is allowed to."""

    def __init__(self, *records: WorkerRecord) -> None:
        super().__init__(*records)
        self.answers = threading.Semaphore(0)

    def snapshot(self) -> list[WorkerRecord]:
        found = super().snapshot()
        assert self.answers.acquire(timeout=10.0)
        return found


def test_those_who_ask_while_the_registry_is_being_read_share_the_next_reading() -> None:
    async def scene() -> None:
        registry = SlowRegistry(record("a"))
        view = RegistryView(registry, refresh_s=1000.0)
        num_told = 0

        def count() -> None:
            nonlocal num_told
            num_told += 1

        view.on_read = count
        asking = [asyncio.ensure_future(view.refresh()) for _ in range(3)]
        while not registry.num_snapshots:
            await asyncio.sleep(0.001)
        registry.records = [record("b")]
        assert registry.num_snapshots == 1, "never two at once"
        registry.answers.release(3)
        await asyncio.gather(*asking)
        assert (registry.num_snapshots, num_told) == (2, 2)
        assert [ready.model_name for ready in view.ready()] == ["b"], "as it was when they asked, or later"
        await view.refresh()
        assert registry.num_snapshots == 3

    asyncio.run(asyncio.wait_for(scene(), 10.0))


def test_whoever_gives_up_waiting_for_the_registry_takes_nobody_along() -> None:
    async def scene() -> None:
        registry = SlowRegistry(record("a"))
        view = RegistryView(registry, refresh_s=1000.0)
        first, impatient, patient = (asyncio.ensure_future(view.refresh()) for _ in range(3))
        while not registry.num_snapshots:
            await asyncio.sleep(0.001)
        first.cancel()
        impatient.cancel()
        await asyncio.wait([first, impatient])
        registry.answers.release(2)
        await patient
        assert [ready.model_name for ready in view.ready()] == ["a"]

    asyncio.run(asyncio.wait_for(scene(), 10.0))
