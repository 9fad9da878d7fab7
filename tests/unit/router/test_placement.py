"""Where requests go: load, avoided workers, layouts that do not fit, wishes, and what is counted until the end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import TypeVar

import pytest
from router_rig import LAYOUT, Desk, FakeWorkers, open_desk, prefill_record, record

from kelp.client.base import WorkerOutput
from kelp.core.clock import FakeClock
from kelp.core.errors import CapacityError
from kelp.core.messages import Finished, Progress, RequestTimings, RequestUsage
from kelp.core.types import Role, SequenceHash, WorkerKey
from kelp.registry.base import WorkerRecord
from kelp.router.decision.request import RoutingRequest
from kelp.router.placement import Placement, key_of

OTHER_LAYOUT = LAYOUT.model_copy(update={"dtype": "bfloat16"})
HASHES = (SequenceHash(b"a" * 16),)
ResultT = TypeVar("ResultT")


def run(work: Coroutine[object, object, ResultT]) -> ResultT:
    return asyncio.run(work)


def desk(*records: WorkerRecord, disaggregation: str = "auto", policy: str = "least-loaded") -> Desk:
    return open_desk(FakeWorkers(*records), clock=FakeClock(), disaggregation=disaggregation, policy=policy)


def asked(name: str = "r", **fields: object) -> RoutingRequest:
    return replace(RoutingRequest(num_prompt_tokens=4, block_hashes=HASHES, request_id=name), **fields)


async def place(
    desk: Desk, name: str = "r", avoid: frozenset[WorkerKey] = frozenset(), allow_prefill: bool = True, **fields: object
) -> Placement:
    return await desk.placer.place(asked(name, **fields), avoid, allow_prefill)


def names_at(desk: Desk, **arguments: object) -> tuple[str | None, str]:
    placement = run(place(desk, **arguments))
    placement.end(is_completed=False)
    return placement.prefill and placement.prefill.model_name, placement.decode.model_name


def test_a_prefill_worker_is_used_where_one_is_ready() -> None:
    assert names_at(desk(prefill_record(), record("decode"))) == ("prefill", "decode")


def test_without_a_prefill_worker_auto_serves_aggregated() -> None:
    assert names_at(desk(record("decode"))) == (None, "decode")


def test_always_refuses_without_a_prefill_worker() -> None:
    with pytest.raises(CapacityError, match="no prefill worker"):
        names_at(desk(record("decode"), disaggregation="always"))


def test_never_ignores_prefill_workers() -> None:
    assert names_at(desk(prefill_record(), record("decode"), disaggregation="never")) == (None, "decode")


@pytest.mark.parametrize("disaggregation", ["auto", "always"])
def test_remote_prefill_that_failed_too_often_is_not_tried_again(disaggregation: str) -> None:
    chosen = desk(prefill_record(), record("decode"), disaggregation=disaggregation)
    assert names_at(chosen, allow_prefill=False) == (None, "decode")


def test_a_prefill_worker_of_another_layout_is_not_used() -> None:
    misfit = prefill_record("misfit", layout=OTHER_LAYOUT)
    assert names_at(desk(misfit, prefill_record("fit"), record("decode"))) == ("fit", "decode")
    assert names_at(desk(misfit, record("decode"))) == (None, "decode")
    with pytest.raises(CapacityError, match="KV layout"):
        names_at(desk(misfit, record("decode"), disaggregation="always"))


def test_pools_of_different_size_fit_each_other() -> None:
    small = prefill_record(layout=LAYOUT.model_copy(update={"num_blocks": 2}))
    assert names_at(desk(small, record("decode"))) == ("prefill", "decode")


def test_an_aggregated_worker_decodes_and_never_prefills_for_others() -> None:
    assert names_at(desk(record("both", Role.AGGREGATED))) == (None, "both")


def test_a_prefill_worker_alone_serves_nobody() -> None:
    with pytest.raises(CapacityError, match="no decode worker is ready"):
        names_at(desk(prefill_record()))


def test_a_request_that_finds_no_worker_looks_again() -> None:
    workers = FakeWorkers()
    workers.arriving.append(record("late"))
    assert run(place(open_desk(workers))).decode.model_name == "late"


def test_requests_count_until_they_end() -> None:
    async def scene() -> None:
        chosen = desk(record("d1"), record("d2"))
        first, second = await place(chosen, "1"), await place(chosen, "2")
        assert {first.decode.model_name, second.decode.model_name} == {"d1", "d2"}
        first.end(is_completed=True)
        third = await place(chosen, "3")
        assert third.decode == first.decode
        for placement in (first, second, third):
            placement.end(is_completed=False)
        assert chosen.selector.load.active.tolist() == [0.0, 0.0]
        assert chosen.own.snapshot().loads == ()

    run(scene())


@pytest.mark.parametrize("policy", ["least-loaded", "kelp", "dynamo", "power-of-two"])
def test_a_burst_spreads_although_all_heartbeats_are_old(policy: str) -> None:
    """Heartbeats that say idle are a second old when a burst comes; and that say busy, when it has ended."""

    async def scene() -> None:
        workers = FakeWorkers(record("d1"), record("d2"))
        chosen = open_desk(workers, clock=FakeClock(), policy=policy)
        for number in range(6):
            burst = [await place(chosen, f"{number} {index}") for index in range(8)]
            assert {placement.decode.model_name for placement in burst} == {"d1", "d2"}
            on_d1 = sum(placement.decode.model_name == "d1" for placement in burst)
            assert policy == "power-of-two" or on_d1 == 4
            for placement in burst:
                placement.end(is_completed=True)
            reported = {"d1": on_d1, "d2": 8 - on_d1}
            workers.known = [
                known.model_copy(update={"num_running": reported[known.model_name], "heartbeat_ns": number + 1})
                for known in workers.known
            ]
            chosen.placer.update()

    run(scene())


def test_a_worker_that_just_failed_is_avoided() -> None:
    d1, d2 = record("d1"), record("d2")
    chosen = desk(d1, d2)
    assert {names_at(chosen, avoid=frozenset({key_of(d1)})) for _ in range(3)} == {(None, "d2")}


def test_an_avoided_worker_is_better_than_none() -> None:
    only = record("decode")
    assert names_at(desk(only), avoid=frozenset({key_of(only)})) == (None, "decode")


def test_nobody_is_sent_to_a_worker_that_died_until_it_shows_itself_again() -> None:
    d1 = record("d1").model_copy(update={"heartbeat_ns": 5})
    workers = FakeWorkers(d1)
    chosen = open_desk(workers)
    # The record that the failed request was placed by may be older than the latest one.
    chosen.placer.leave(d1.model_copy(update={"heartbeat_ns": 3}))
    with pytest.raises(CapacityError):
        names_at(chosen)
    # The first renewal that is seen may have been written before it died.
    workers.known = [d1.model_copy(update={"heartbeat_ns": 6})]
    for _ in range(2):
        with pytest.raises(CapacityError):
            names_at(chosen)
    workers.known = [d1.model_copy(update={"heartbeat_ns": 7})]
    assert names_at(chosen) == (None, "d1")


def test_the_successor_of_a_worker_that_died_serves_at_once() -> None:
    d1 = record("d1")
    workers = FakeWorkers(d1)
    chosen = open_desk(workers)
    chosen.placer.leave(d1)
    workers.known = [d1, d1.model_copy(update={"epoch": "another"})]
    chosen.placer.update()
    for number in range(3):
        placement = run(place(chosen, str(number)))
        assert placement.decode.epoch == "another"


def test_a_pinned_worker_serves_whatever_the_load() -> None:
    chosen = desk(record("d1"), record("d2"))
    assert {names_at(chosen, name=str(number), pinned_worker="d2") for number in range(4)} == {(None, "d2")}
    with pytest.raises(CapacityError, match="d9"):
        names_at(chosen, pinned_worker="d9")


def test_required_tags_narrow_and_preferred_tags_draw() -> None:
    chosen = desk(record("d1", tags={"zone": "a"}), record("d2", tags={"zone": "b"}))
    assert names_at(chosen, required_tags={"zone": "b"}) == (None, "d2")
    with pytest.raises(CapacityError, match="zone=c"):
        names_at(chosen, required_tags={"zone": "c"})


def test_a_sequence_beside_another_is_counted_on_the_same_worker() -> None:
    async def scene() -> None:
        chosen = desk(prefill_record(), record("d1"), record("d2"))
        first = await place(chosen, "r")
        beside = chosen.placer.beside(first, asked("r-1"))
        assert (beside.decode, beside.prefill) == (first.decode, None)
        for placement in (first, beside):
            placement.sent()
        assert len(chosen.own.snapshot().loads) == 2
        first.end(is_completed=True)
        beside.end(is_completed=True)
        assert chosen.selector.load.active.sum() == 0

    run(scene())


def test_a_sequence_stays_beside_another_on_a_worker_that_takes_no_new_requests() -> None:
    async def scene() -> None:
        workers = FakeWorkers(record("d1"))
        chosen = open_desk(workers)
        first = await place(chosen, "r")
        workers.known = [record("d1", state="draining"), record("d2")]
        chosen.placer.update()
        assert chosen.placer.beside(first, asked("r-1")).decode.model_name == "d1"

    run(scene())


def says(*token_ids: int, event: Progress | Finished | None = None) -> WorkerOutput:
    return WorkerOutput(token_ids, tuple(0.0 for _ in token_ids), event)


TIMES = RequestTimings(arrival_ns=10**9, first_scheduled_ns=3 * 10**9, first_token_ns=8 * 10**9)


def test_what_workers_tell_reaches_the_explanation() -> None:
    async def scene() -> None:
        chosen = desk(record("d1"))
        placement = await place(chosen, "r")
        placement.sent()
        chosen.clock.advance(9.0)  # type: ignore[attr-defined]
        placement.heard(says())
        placement.heard(says(1, event=Progress(usage=RequestUsage(cached_tokens=3), timings=TIMES)))
        chosen.clock.advance(2.0)  # type: ignore[attr-defined]
        placement.heard(says(2, 3))
        placement.end(is_completed=True)
        explanation = chosen.selector.explain("r")
        assert explanation is not None
        outcome = explanation.outcome
        assert (outcome.state, outcome.num_output_tokens, outcome.num_cached_tokens) == ("completed", 3, 3)
        assert (outcome.ttft_s, outcome.queue_s, outcome.prefill_s, outcome.itl_s) == (9.0, 2.0, 5.0, 1.0)

    run(scene())


def test_a_transfer_counts_by_what_prefill_did_not_hide() -> None:
    async def scene() -> None:
        chosen = desk(prefill_record(), record("d1"))
        placement = await place(chosen, "r")
        told: list[float] = []
        chosen.ledger.transferred = lambda decision, seconds: told.append(seconds)  # type: ignore[method-assign]
        placement.heard(says(1, event=Finished(finish_reason=None, timings=RequestTimings(prefill_done_ns=5 * 10**9))))
        times = RequestTimings(transfer_start_ns=2 * 10**9, transfer_done_ns=7 * 10**9)
        placement.heard(says(2, event=Progress(timings=times)))
        placement.heard(says(event=Finished(finish_reason="stop", timings=times)))
        assert told == [2.0]

    run(scene())


def test_a_reservation_that_lapsed_before_the_request_was_sent_is_made_again() -> None:
    async def scene() -> None:
        chosen = desk(record("d1"))
        placement = await place(chosen, "r")
        chosen.clock.advance(1e6)  # type: ignore[attr-defined]
        placement.sent()
        assert chosen.selector.load.active.tolist() == [1.0]
        placement.end(is_completed=False)
        placement.end(is_completed=True)
        assert chosen.selector.load.active.tolist() == [0.0]

    run(scene())


def test_nothing_is_counted_after_the_end() -> None:
    async def scene() -> None:
        chosen = desk(record("d1"))
        placement = await place(chosen, "r")
        placement.end(is_completed=False)
        placement.sent()
        placement.heard(says(1))
        assert chosen.selector.load.active.tolist() == [0.0]
        assert chosen.own.snapshot().loads == ()

    run(scene())


def test_a_request_that_was_never_sent_is_not_announced_afterwards() -> None:
    async def scene() -> None:
        chosen = desk(record("d1"))
        placement = await place(chosen, "r")
        placement.end(is_completed=False)
        placement.sent()
        assert chosen.own.snapshot().loads == ()
        assert chosen.selector.load.active.sum() == 0

    run(scene())


def test_other_routers_hear_of_every_step_from_sending_on() -> None:
    async def scene() -> None:
        chosen = desk(prefill_record(), record("d1"))
        placement = await place(chosen, "r")
        assert chosen.own.snapshot().loads == ()
        placement.sent()
        (load,) = chosen.own.snapshot().loads
        assert (load.decode, load.prefill) == (placement.decode.key, prefill_record().key)
        assert (load.kv_tokens, load.work[1], load.is_prefilled) == (4, 4.0, False)
        placement.heard(says(1))
        assert chosen.own.snapshot().loads[0].is_prefilled
        placement.end(is_completed=True)
        assert chosen.own.snapshot().loads == ()

    run(scene())
