"""How a worker shows itself: registry records, drain, registry outages, stop."""

from __future__ import annotations

import asyncio
import logging
import math
import threading

import pytest
from worker_rig import LAYOUT, FakeRegistry, completed, open_worker, prefilled, token

from kelp.core.errors import CapacityError, EngineFailed, WorkerDraining, WorkerStuck
from kelp.core.messages import WORKER_STATUS, DrainCommand
from kelp.core.types import HandoffShape, Role, WorkerState
from kelp.core.wire import decode_message
from kelp.executor.base import ExecutorEvent, Failed
from kelp.registry.base import LayoutRecord, WorkerRecord
from kelp.worker import watchdog
from kelp.worker.presence import Presence
from support.exchange import FakeExchange
from support.waiting import until


def states(registry: FakeRegistry) -> list[WorkerState]:
    return [record.state for record in registry.published]


def status_state(exchange: FakeExchange) -> str:
    return decode_message(WORKER_STATUS, exchange.responses[0]["event"][0], "status").state


def test_a_worker_becomes_visible_with_all_that_a_router_needs() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL) as rig:
            record = rig.registry.published[0]
            assert (record.worker_id, record.epoch, record.model_name) == ("host:1/prefill", "epoch", "prefill")
            assert (record.role, record.state, record.endpoint) == (Role.PREFILL, WorkerState.READY, "host:1")
            assert record.handoff_shape is HandoffShape.RENDEZVOUS
            assert record.layout == LayoutRecord.of(LAYOUT)
            host, _, port = record.handoff_endpoint.rpartition(":")
            assert (host, int(port) > 0) == ("127.0.0.1", True)

    asyncio.run(scene())


def test_every_heartbeat_tells_the_present_load() -> None:
    async def scene() -> None:
        async with open_worker(heartbeat_s=0.005) as rig:
            await rig.generate()
            await until(lambda: rig.registry.published[-1].num_running == 1, "a heartbeat with the request")

    asyncio.run(scene())


def test_a_draining_worker_says_so_at_once_and_refuses_new_requests() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            _, running = await rig.generate()
            exchange, draining = rig.command(DrainCommand(timeout_s=60.0))
            await until(lambda: states(rig.registry)[-1] is WorkerState.DRAINING, "the record")
            _, refused = await rig.generate()
            with pytest.raises(WorkerDraining, match="host:1/decode is draining"):
                await refused
            assert not draining.done(), "drained although a request runs"
            rig.executor.emit(token(1), completed())
            await running
            await draining
            assert status_state(exchange) == "draining"

    asyncio.run(scene())


def test_a_draining_prefill_worker_waits_for_its_leases() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL, lease_ttl_s=0.2) as rig:
            _, task = await rig.generate(Role.PREFILL, rig.rendezvous())
            rig.executor.emit(prefilled(8, 3, 5), token(7), completed(None))
            await task
            _, draining = rig.command(DrainCommand(timeout_s=60.0))
            await until(lambda: states(rig.registry)[-1] is WorkerState.DRAINING, "the record")
            assert rig.handoffs.num_leases == 1 and not draining.done()
            await draining
            assert rig.handoffs.num_leases == 0

    asyncio.run(scene())


def test_a_drain_that_takes_too_long_answers_with_what_still_runs() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            await rig.generate()
            exchange, draining = rig.command(DrainCommand(timeout_s=0.01))
            await draining
            status = decode_message(WORKER_STATUS, exchange.responses[0]["event"][0], "status")
            assert (status.state, status.num_running) == ("draining", 1)

    asyncio.run(scene())


def test_what_still_runs_when_the_grace_is_over_is_given_up_with_all_that_it_has_said() -> None:
    async def scene() -> None:
        async with open_worker(grace_s=0.01) as rig:
            exchange, running = await rig.generate()
            rig.executor.emit(token(1), token(2))
            await until(lambda: exchange.token_ids == [1, 2], "the tokens")
            status, draining = rig.command(DrainCommand(timeout_s=60.0))
            with pytest.raises(WorkerDraining, match="its grace_s is over"):
                await running
            await draining
            assert rig.executor.names() == ["abort"]
            assert status_state(status) == "draining"

    asyncio.run(scene())


def test_a_prefill_that_still_runs_when_the_grace_is_over_frees_its_lease() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL, grace_s=0.01) as rig:
            _, running = await rig.generate(Role.PREFILL, rig.rendezvous())
            rig.executor.emit(prefilled(4, 3))
            _, draining = rig.command(DrainCommand(timeout_s=60.0))
            with pytest.raises(WorkerDraining):
                await running
            await draining
            assert rig.handoffs.num_leases == 0

    asyncio.run(scene())


def test_a_worker_whose_engine_does_not_get_on_says_so_and_gives_its_requests_up() -> None:
    async def scene() -> None:
        async with open_worker(step_timeout_s=0.02) as rig:
            _, running = await rig.generate()
            rig.executor.step_s = 7.0
            with pytest.raises(WorkerStuck, match="host:1/decode is stuck in a step of 7 s"):
                await running
            assert rig.executor.names() == ["abort"]
            await until(lambda: states(rig.registry)[-1] is WorkerState.STUCK, "the record")
            _, refused = await rig.generate()
            with pytest.raises(WorkerStuck, match="host:1/decode is stuck"):
                await refused
            assert (await rig.status()).state == "stuck"

    asyncio.run(scene())


def test_an_engine_that_was_only_slow_gets_requests_again() -> None:
    async def scene() -> None:
        async with open_worker(step_timeout_s=0.02) as rig:
            rig.executor.step_s = 7.0
            await until(lambda: states(rig.registry)[-1] is WorkerState.STUCK, "the record")
            rig.executor.step_s = 0.0
            await until(lambda: states(rig.registry)[-1] is WorkerState.READY, "the record")
            exchange, task = await rig.generate()
            rig.executor.emit(token(1), completed())
            await task
            assert exchange.token_ids == [1]

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("step_s", "end_after_s", "ends"),
    [(7.0, 6.9, True), (7.0, 8.0, False), (math.inf, 300.0, True), (math.inf, 0.0, False)],
    ids=["stuck for long", "stuck", "dead", "dead and told not to"],
)
def test_a_worker_whose_engine_is_beyond_hope_ends_once_its_requests_have_been_given_up(
    monkeypatch: pytest.MonkeyPatch, step_s: float, end_after_s: float, ends: bool
) -> None:
    async def scene() -> None:
        async with open_worker(step_timeout_s=0.02, end_after_s=end_after_s) as rig:
            _, running = await rig.generate()
            seen: list[bool] = []
            monkeypatch.setattr(watchdog, "_end_process", lambda: seen.append(running.done()))
            rig.executor.step_s = step_s
            with pytest.raises(WorkerStuck):
                await running
            num_loads = rig.executor.num_loads
            await until(lambda: bool(seen) or rig.executor.num_loads > num_loads + 5, "its end, or some more looks")
            assert seen[:1] == ([True] if ends else [])

    asyncio.run(scene())


def test_a_worker_whose_engine_fails_at_its_own_tests_too_is_stuck_until_one_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog, "_LONGEST_LOOK_S", 0.005)

    async def scene() -> None:
        async with open_worker() as rig:
            is_end_asked: list[bool] = []
            monkeypatch.setattr(watchdog, "_end_process", lambda: is_end_asked.append(True))
            rig.executor.num_failed_steps = 3
            for number in range(3):
                assert states(rig.registry)[-1] is WorkerState.READY
                await until(lambda number=number: len(rig.executor.requests) > number, "a test of its own")
                rig.executor.emit(Failed(EngineFailed("engine step failed: a device that has faulted")))
            await until(lambda: states(rig.registry)[-1] is WorkerState.STUCK, "the record")
            _, refused = await rig.generate()
            with pytest.raises(WorkerStuck, match="host:1/decode is stuck"):
                await refused
            await until(lambda: len(rig.executor.requests) > 3, "another test")
            rig.executor.emit(Failed(EngineFailed("engine step failed: a device that has faulted")))
            await until(lambda: bool(is_end_asked), "its end")
            await until(lambda: len(rig.executor.requests) > 4, "yet another test")
            rig.executor.num_failed_steps = 0
            rig.executor.emit(token(1), completed())
            await until(lambda: states(rig.registry)[-1] is WorkerState.READY, "the record")

    asyncio.run(scene())


@pytest.mark.parametrize(
    "answer", [[token(1), completed()], [Failed(CapacityError("no room"))]], ids=["passes", "full"]
)
def test_a_worker_that_was_served_bad_requests_passes_its_own_test(
    answer: list[ExecutorEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_LONGEST_LOOK_S", 0.005)

    async def scene() -> None:
        async with open_worker() as rig:
            rig.executor.num_failed_steps = 3
            for number in range(4):
                await until(lambda number=number: len(rig.executor.requests) > number, "a test of its own")
                rig.executor.emit(*answer)
            assert set(states(rig.registry)) == {WorkerState.READY}

    asyncio.run(scene())


def test_a_stuck_worker_that_is_drained_does_not_come_back() -> None:
    async def scene() -> None:
        async with open_worker(step_timeout_s=0.02) as rig:
            rig.executor.step_s = 7.0
            await until(lambda: states(rig.registry)[-1] is WorkerState.STUCK, "the record")
            _, draining = rig.command(DrainCommand(timeout_s=60.0))
            await draining
            num_published = len(rig.registry.published)
            rig.executor.step_s = 0.0
            await until(lambda: len(rig.registry.published) > num_published, "the next record")
            assert states(rig.registry)[-1] is WorkerState.DRAINING

    asyncio.run(scene())


def test_an_idle_worker_is_drained_at_once() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            exchange, draining = rig.command(DrainCommand())
            await draining
            assert status_state(exchange) == "draining"

    asyncio.run(scene())


def test_a_worker_that_stops_leaves_the_registry_and_closes_its_engine() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            _, running = await rig.generate()
            await rig.service.stop()
            with pytest.raises(WorkerDraining, match="host:1/decode is stopping"):
                await running
            assert rig.registry.withdrawn == [("host:1/decode", "epoch")]
            assert rig.executor.is_closed

    asyncio.run(scene())


def test_a_worker_serves_on_while_the_registry_is_out_of_reach(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with open_worker(heartbeat_s=0.005) as rig:
            rig.registry.error = OSError("no space left on device")
            await until(lambda: "registry unreachable" in caplog.text, "a failed heartbeat")
            exchange, task = await rig.generate()
            rig.executor.emit(token(1), completed())
            await task
            assert exchange.token_ids == [1]
            num_published = len(rig.registry.published)
            rig.registry.error = None
            await until(lambda: len(rig.registry.published) > num_published + 1, "heartbeats again")
            assert caplog.text.count("registry unreachable") == 1, "said once, not at every heartbeat"

    with caplog.at_level(logging.WARNING):
        asyncio.run(scene())


def test_a_worker_stops_even_if_the_registry_is_out_of_reach() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            rig.registry.error = OSError("gone")
            await rig.service.stop()
            assert rig.executor.is_closed

    asyncio.run(scene())


class SlowRegistry(FakeRegistry):
    """Publishes when told to; `log` shows in which order calls ended."""

    def __init__(self) -> None:
        super().__init__()
        self.is_publishing, self.may_publish = threading.Event(), threading.Event()
        self.log: list[str] = []

    def publish(self, record: WorkerRecord) -> None:
        self.is_publishing.set()
        assert self.may_publish.wait(10.0)
        self.log.append(record.state.value)

    def withdraw(self, worker_id: str, epoch: str) -> None:
        self.log.append("withdrawn")


@pytest.fixture
def record() -> WorkerRecord:
    return WorkerRecord(
        worker_id="host:1/decode",
        epoch="epoch",
        model_name="decode",
        role=Role.DECODE,
        state=WorkerState.READY,
        endpoint="host:1",
        layout=LayoutRecord.of(LAYOUT),
    )


def test_a_change_of_state_is_not_overtaken_by_an_older_heartbeat(record: WorkerRecord) -> None:
    async def scene() -> None:
        state, registry = WorkerState.READY, SlowRegistry()
        presence = Presence(registry, lambda: record.model_copy(update={"state": state}), 60.0)
        heartbeat = asyncio.ensure_future(presence.publish())
        await until(registry.is_publishing.is_set, "a heartbeat under way")
        state = WorkerState.DRAINING
        change = asyncio.ensure_future(presence.publish())
        registry.may_publish.set()
        await asyncio.gather(heartbeat, change)
        assert registry.log == ["ready", "draining"]

    asyncio.run(scene())


def test_a_worker_that_leaves_is_not_brought_back_by_a_heartbeat_under_way(record: WorkerRecord) -> None:
    async def scene() -> None:
        registry = SlowRegistry()
        presence = Presence(registry, lambda: record, 60.0)
        running = asyncio.ensure_future(presence.run())
        await until(registry.is_publishing.is_set, "a heartbeat under way")
        running.cancel()
        leaving = asyncio.ensure_future(presence.withdraw())
        await asyncio.sleep(0.01)
        assert registry.log == [], "the withdrawal overtook the heartbeat"
        registry.may_publish.set()
        await asyncio.gather(running, leaving, return_exceptions=True)
        assert registry.log == ["ready", "withdrawn"]

    asyncio.run(scene())
