"""Full workers make requests wait: who goes when there is room, and who is refused instead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace

import pytest
from router_rig import Desk, FakeWorkers, open_desk, prefill_record, record

from kelp.core.clock import FakeClock
from kelp.core.config_replicas import QueueConfig
from kelp.core.errors import CapacityError, NoWorker
from kelp.core.metrics import QUEUE_WAIT, Metrics
from kelp.registry.base import WorkerRecord
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.selector import Decision
from kelp.router.placement import Placement
from support.virtual_time import run_in_virtual_time


class Counter:
    """A router before workers of one sequence each; time passes for it and for the loop together."""

    def __init__(self, *workers: WorkerRecord, **queue: object) -> None:
        self.clock = FakeClock()
        self.metrics = Metrics()
        self.workers = FakeWorkers(*(workers or (one("d1"),)))
        config = QueueConfig.model_validate(queue)
        self.desk: Desk = open_desk(self.workers, self.metrics, self.clock, config)

    async def ask(self, name: str, **fields: object) -> asyncio.Task[Placement]:
        request = replace(RoutingRequest(num_prompt_tokens=4, block_hashes=(), request_id=name), **fields)
        task = asyncio.ensure_future(self.desk.placer.place(request))
        await settle()
        return task

    async def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await asyncio.sleep(seconds)
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def one(name: str, **fields: object) -> WorkerRecord:
    return record(name, max_running=1, **fields)


def play(scene: Callable[[], Coroutine[object, object, None]]) -> None:
    run_in_virtual_time(scene())


def test_a_request_waits_while_the_only_worker_is_full_and_goes_when_it_is_not() -> None:
    async def scene() -> None:
        counter = Counter()
        first, second = await counter.ask("1"), await counter.ask("2")
        assert first.done() and not second.done()
        first.result().end(is_completed=True)
        await settle()
        assert second.result().decode.model_name == "d1"
        assert counter.desk.admission.num_waiting == 0
        assert counter.metrics.take()[2][QUEUE_WAIT, ()] == [0.0]

    play(scene)


def test_nobody_waits_while_another_worker_has_room() -> None:
    async def scene() -> None:
        counter = Counter(one("d1"), one("d2"))
        both = [await counter.ask(name) for name in "12"]
        assert {task.result().decode.model_name for task in both} == {"d1", "d2"}
        assert not (await counter.ask("3")).done()

    play(scene)


def test_two_who_wait_never_get_the_same_place() -> None:
    async def scene() -> None:
        counter = Counter()
        first = await counter.ask("1")
        others = [await counter.ask(name) for name in "23"]
        first.result().end(is_completed=True)
        await settle()
        assert [task.done() for task in others] == [True, False]

    play(scene)


def test_a_newcomer_does_not_overtake_who_waits() -> None:
    async def scene() -> None:
        counter = Counter()
        first, second = await counter.ask("1"), await counter.ask("2")
        first.result().end(is_completed=True)
        third = await counter.ask("3")
        assert second.done() and not third.done()

    play(scene)


def test_priority_goes_before_arrival() -> None:
    async def scene() -> None:
        counter = Counter()
        first, low, high = await counter.ask("1"), await counter.ask("2"), await counter.ask("3", priority=1)
        first.result().end(is_completed=True)
        await settle()
        assert high.done() and not low.done()

    play(scene)


def test_a_worker_that_joins_takes_from_the_queue() -> None:
    async def scene() -> None:
        counter = Counter()
        _, second = await counter.ask("1"), await counter.ask("2")
        counter.workers.known.append(one("d2"))
        counter.desk.placer.update()
        await settle()
        assert second.result().decode.model_name == "d2"

    play(scene)


def test_a_prompt_that_has_been_computed_makes_room_in_the_prefill_window() -> None:
    async def scene() -> None:
        counter = Counter(record("d1"), prefill_window_s=1e-6)
        first, second = await counter.ask("1"), await counter.ask("2")
        assert not second.done()
        counter.desk.selector.load.pending_s[:] = 0.0
        counter.desk.ledger.on_room()
        await settle()
        assert first.done() and second.done()

    play(scene)


def test_a_worker_whose_blocks_are_taken_is_full() -> None:
    async def scene() -> None:
        counter = Counter(record("d1"), kv_factor=1.0)
        assert (await counter.ask("1", num_prompt_tokens=256)).done()
        assert not (await counter.ask("2")).done()

    play(scene)


def test_an_idle_worker_is_never_full() -> None:
    async def scene() -> None:
        assert (await Counter(record("d1")).ask("1", num_prompt_tokens=10**6)).done()

    play(scene)


def test_a_full_prefill_worker_makes_requests_wait_as_well() -> None:
    async def scene() -> None:
        counter = Counter(prefill_record(max_running=1), record("d1"))
        first, second = await counter.ask("1"), await counter.ask("2")
        assert first.done() and not second.done()
        first.result().end(is_completed=True)
        await settle()
        assert second.done()

    play(scene)


def test_a_pinned_request_waits_for_its_worker_and_holds_up_nobody() -> None:
    async def scene() -> None:
        counter = Counter(one("d1"), one("d2"))
        first = await counter.ask("1", pinned_worker="d1")
        pinned = await counter.ask("2", pinned_worker="d1")
        other = await counter.ask("3")
        assert other.result().decode.model_name == "d2"
        assert not pinned.done()
        other.result().end(is_completed=True)
        await settle()
        assert not pinned.done()
        first.result().end(is_completed=True)
        await settle()
        assert pinned.result().decode.model_name == "d1"

    play(scene)


def test_without_a_queue_everything_goes_to_workers_at_once() -> None:
    async def scene() -> None:
        counter = Counter(max_waiting=0)
        assert all([(await counter.ask(str(number))).done() for number in range(5)])

    play(scene)


def test_a_full_queue_refuses_with_advice() -> None:
    async def scene() -> None:
        counter = Counter(max_waiting=1)
        await counter.ask("1")
        await counter.ask("2")
        with pytest.raises(CapacityError, match=r"1 requests wait, the limit is 1; Retry-After: \d+"):
            await (await counter.ask("3"))

    play(scene)


def test_a_displaced_request_is_told_so() -> None:
    async def scene() -> None:
        counter = Counter(max_waiting=1)
        first, low, high = await counter.ask("1"), await counter.ask("2"), await counter.ask("3", priority=1)
        with pytest.raises(CapacityError, match="higher priority.*Retry-After"):
            await low
        first.result().end(is_completed=True)
        await settle()
        assert high.done()

    play(scene)


def test_a_request_whose_deadline_passes_in_the_queue_is_refused_before_it() -> None:
    async def scene() -> None:
        counter = Counter()
        await counter.ask("1")
        hopeless = await counter.ask("2", deadline_s=counter.clock.monotonic_s() + 1.0)
        await counter.pass_time(0.9)
        assert not hopeless.done()
        await counter.pass_time(0.5)
        with pytest.raises(CapacityError, match="deadline_ms: it can no longer be met.*Retry-After"):
            await hopeless
        assert counter.desk.admission.num_waiting == 0

    play(scene)


def test_a_request_that_has_waited_for_longer_than_its_first_token_may_take_is_refused() -> None:
    async def scene() -> None:
        counter = Counter(ttft_target_s=1.0)
        await counter.ask("1")
        late = await counter.ask("2")
        await counter.pass_time(0.9)
        assert not late.done()
        await counter.pass_time(0.5)
        with pytest.raises(CapacityError, match="queue.ttft_target_s: it can no longer be met.*Retry-After"):
            await late
        assert counter.desk.admission.num_waiting == 0

    play(scene)


def test_a_cancelled_request_leaves_the_queue() -> None:
    async def scene() -> None:
        counter = Counter()
        first, second, third = await counter.ask("1"), await counter.ask("2"), await counter.ask("3")
        second.cancel()
        await settle()
        assert counter.desk.admission.num_waiting == 1
        first.result().end(is_completed=True)
        await settle()
        assert third.done()

    play(scene)


def test_a_place_that_comes_with_the_cancellation_goes_to_the_next() -> None:
    async def scene() -> None:
        counter = Counter()
        first, second, third = await counter.ask("1"), await counter.ask("2"), await counter.ask("3")
        first.result().end(is_completed=True)
        second.cancel()
        await settle()
        assert second.cancelled()
        assert third.done()
        third.result().end(is_completed=True)
        assert counter.desk.selector.load.active.tolist() == [0.0]

    play(scene)


def test_who_waits_for_workers_that_all_go_hears_that_there_are_none() -> None:
    async def scene() -> None:
        counter = Counter()
        _, second = await counter.ask("1"), await counter.ask("2")
        counter.workers.known.clear()
        counter.desk.placer.update()
        with pytest.raises(CapacityError, match="no decode worker is ready"):
            await second

    play(scene)


def test_a_place_that_falls_free_costs_few_decisions_however_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        counter = Counter(prefill_record(max_running=1), record("d1", max_running=100))
        counter.desk = open_desk(counter.workers, counter.metrics, counter.clock, disaggregation="always")
        first = await counter.ask("1")
        waiting = [await counter.ask(f"w{number}") for number in range(20)]
        num_selected = 0
        select = counter.desk.selector.select

        def counted(*arguments: object, **options: object) -> Decision:
            nonlocal num_selected
            num_selected += 1
            return select(*arguments, **options)

        monkeypatch.setattr(counter.desk.selector, "select", counted)
        first.result().end(is_completed=True)
        await settle()
        assert [task.done() for task in waiting] == [True] + [False] * 19
        assert 1 <= num_selected <= 2 + 8

    play(scene)


def test_all_who_wait_are_refused_once_nobody_is_left_to_wait_for() -> None:
    async def scene() -> None:
        counter = Counter()
        await counter.ask("1")
        waiting = [await counter.ask(f"w{number}") for number in range(20)]
        counter.workers.known.clear()
        counter.desk.placer.update()
        await settle()
        assert [type(task.exception()) for task in waiting] == [NoWorker] * 20

    play(scene)


def test_one_who_gave_up_in_the_queue_does_not_keep_a_place_from_the_next() -> None:
    async def scene() -> None:
        counter = Counter()
        first = await counter.ask("1")
        waiting = [await counter.ask(f"w{number}") for number in range(10)]
        for task in waiting[:9]:
            task.cancel()
        first.result().end(is_completed=True)
        await settle()
        assert waiting[9].done() and not waiting[9].cancelled()

    play(scene)
