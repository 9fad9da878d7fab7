"""What is counted where, and for how long."""

from __future__ import annotations

from collections import Counter

import pytest

from kelp.core.types import Role
from kelp.registry.base import WorkerRecord
from kelp.router.decision.selector import Decision, Ended, FirstToken
from support.selector_rig import Rig, worker

TOLD = FirstToken(0, 0.0, 0.1)


def _active(rig: Rig) -> list[float]:
    return rig.selector.load.active.tolist()


def test_a_request_counts_from_reserve_to_free() -> None:
    rig = Rig([worker("a")])
    decision = rig.selector.select(rig.request(160))
    assert _active(rig) == [0]
    rig.selector.reserve(decision)
    load = rig.selector.load
    assert (_active(rig), load.pending_tokens.tolist(), load.kv_tokens.tolist()) == ([1], [160], [160])
    rig.selector.first_token("r1", TOLD)
    assert (load.pending_tokens.tolist(), load.num_decoding.tolist()) == ([0], [1])
    rig.selector.progress("r1", 5)
    assert (load.kv_tokens.tolist(), load.context_tokens.tolist()) == ([165], [165])
    rig.selector.free("r1", Ended(True, 6, 0.1))
    assert not rig.loads().any()


def test_prefill_and_decode_worker_are_both_counted_until_the_first_token() -> None:
    rig = Rig([worker("p", Role.PREFILL), worker("d", Role.DECODE)])
    rig.place()
    assert _active(rig) == [1, 1]
    assert rig.selector.load.pending_tokens.tolist() == [160, 0]
    rig.selector.first_token("r1", TOLD)
    assert _active(rig) == [0, 1]
    rig.selector.free("r1", Ended(False))
    assert not rig.loads().any()


def test_calls_about_unknown_requests_change_nothing() -> None:
    rig = Rig([worker("a")])
    rig.selector.first_token("x", TOLD)
    rig.selector.progress("x", 3)
    rig.selector.transferred("x", 0.1)
    rig.selector.free("x", Ended(True))
    assert not rig.selector.commit("x")
    assert not rig.loads().any()


def test_freeing_twice_counts_once() -> None:
    rig = Rig([worker("a")])
    rig.place()
    rig.place()
    rig.selector.free("r1", Ended(False))
    rig.selector.free("r1", Ended(False))
    assert _active(rig) == [1]


def test_reserving_again_replaces_the_first_reservation() -> None:
    rig = Rig([worker("a"), worker("b")])
    first = rig.selector.select(rig.request(request_id="same", pinned_worker="a"))
    second = rig.selector.select(rig.request(request_id="same", pinned_worker="b"))
    rig.selector.reserve(first)
    rig.selector.reserve(second)
    assert _active(rig) == [0, 1]


def test_a_reservation_without_commit_lapses_and_takes_its_expectation_back() -> None:
    rig = Rig([worker("a")], reservation_ttl_s=5)
    rig.selector.reserve(rig.selector.select(rig.request()))
    rig.clock.advance(5.1)
    assert not rig.selector.commit("r1")
    assert not rig.loads().any()
    assert rig.index.retracted == [0]
    explanation = rig.selector.explain("r1")
    assert explanation is not None
    assert explanation.outcome.state == "lapsed"


def test_a_committed_request_does_not_lapse_with_reservations() -> None:
    rig = Rig([worker("a")], reservation_ttl_s=5, lease_ttl_s=100)
    rig.place()
    rig.clock.advance(50)
    rig.selector.select(rig.request())
    assert _active(rig) == [1]


def test_a_request_is_kept_while_tokens_flow_and_dropped_long_after_they_stopped() -> None:
    rig = Rig([worker("a")], lease_ttl_s=100)
    rig.place()
    rig.selector.first_token("r1", TOLD)
    for _ in range(20):
        rig.clock.advance(60)
        rig.selector.progress("r1", 1)
        rig.selector.select(rig.request())
    assert _active(rig) == [1]
    rig.clock.advance(150)
    rig.selector.select(rig.request())
    assert not rig.loads().any()


def test_what_a_worker_had_goes_with_it_and_its_successor_starts_empty() -> None:
    rig = Rig([worker("a")])
    rig.place()
    rig.selector.set_workers([worker("b")])
    assert rig.table.num_slots == 1
    assert not rig.loads().any()
    rig.selector.first_token("r1", TOLD)
    rig.selector.free("r1", Ended(True, 50, 1.0))
    assert not rig.loads().any()


def test_a_reservation_on_a_worker_that_has_gone_counts_nowhere() -> None:
    rig = Rig([worker("a")])
    decision = rig.selector.select(rig.request())
    rig.selector.set_workers([worker("b")])
    rig.selector.reserve(decision)
    assert not rig.selector.commit("r1")
    assert not rig.loads().any()


def test_a_decision_of_another_process_counts_its_whole_prompt() -> None:
    rig = Rig([worker("a")])
    rig.selector.reserve(Decision(rig.request(320), worker("a"), None))
    assert rig.selector.load.pending_tokens.tolist() == [320]


def test_a_prompt_that_failed_before_its_first_token_is_not_expected_any_more() -> None:
    rig = Rig([worker("a")])
    rig.place()
    rig.selector.free("r1", Ended(False))
    rig.run(rig.request())
    assert (rig.index.expected, rig.index.retracted) == ([0, 0], [0])


@pytest.mark.parametrize("policy", ["least-loaded", "kelp", "dynamo"])
def test_a_stale_heartbeat_does_not_herd_requests_to_the_worker_that_was_idle(policy: str) -> None:
    rig = Rig([worker("a"), worker("b")], policy=policy)
    for _ in range(4):
        rig.place()
    told_late = [worker("a", heartbeat_ns=1, num_running=2), worker("b", heartbeat_ns=1, num_running=0)]
    rig.selector.set_workers(told_late)
    chosen = Counter(rig.place().decode.worker_id for _ in range(8))
    assert chosen == {"a": 4, "b": 4}


def test_a_heartbeat_counts_for_what_own_requests_do_not_explain() -> None:
    rig = Rig([worker("a"), worker("b")], policy="least-loaded")
    rig.place(rig.request(pinned_worker="a"))
    rig.selector.set_workers([worker("a", heartbeat_ns=1, num_running=3, num_waiting=2), worker("b", heartbeat_ns=1)])
    assert rig.selector.load.foreign.tolist() == [4, 0]
    assert {rig.place().decode.worker_id for _ in range(4)} == {"b"}


def test_requests_that_ended_since_the_heartbeat_are_not_taken_for_somebody_elses() -> None:
    rig = Rig([worker("a")])
    for _ in range(3):
        rig.run(rig.request())
    rig.selector.set_workers([worker("a", heartbeat_ns=1, num_running=3)])
    assert rig.selector.load.foreign.tolist() == [0]


def test_the_same_heartbeat_read_again_changes_nothing() -> None:
    rig = Rig([worker("a")])
    record = worker("a", heartbeat_ns=1, num_running=2)
    rig.selector.set_workers([record])
    for _ in range(3):
        rig.run(rig.request())
    rig.selector.set_workers([record])
    assert rig.selector.load.foreign.tolist() == [2]


def _blink(rig: Rig, *others: WorkerRecord) -> None:
    """The worker `a` is missing from one snapshot."""
    rig.selector.set_workers(others)
    assert rig.table.slot(("a", "1")) is None
    rig.selector.set_workers([*others, worker("a")])


def _slot(rig: Rig) -> int:
    slot = rig.table.slot(("a", "1"))
    assert slot is not None
    return slot


def test_what_runs_on_a_worker_that_was_missing_from_one_snapshot_still_counts() -> None:
    rig = Rig([worker("a"), worker("b")])
    for _ in range(3):
        rig.place(rig.request(pinned_worker="a"))
    rig.selector.first_token("r1", TOLD)
    before = rig.loads()[:, _slot(rig)]
    assert before.any()
    # Somebody else gets the slot meanwhile.
    rig.selector.set_workers([worker("b"), worker("c")])
    _blink(rig, worker("b"), worker("c"))
    assert rig.loads()[:, _slot(rig)].tolist() == before.tolist()
    for number in (1, 2, 3):
        rig.selector.first_token(f"r{number}", TOLD)
        rig.selector.free(f"r{number}", Ended(True, 20, 0.1))
    assert not rig.loads().any()


def test_what_happens_while_a_worker_is_missing_is_true_when_it_returns() -> None:
    rig = Rig([worker("a"), worker("b")])
    for _ in range(3):
        rig.place(rig.request(pinned_worker="a"))
    rig.selector.set_workers([worker("b")])
    rig.selector.first_token("r1", TOLD)
    rig.selector.progress("r1", 5)
    rig.selector.free("r2", Ended(False))
    rig.selector.set_workers([worker("a"), worker("b")])
    load, slot = rig.selector.load, _slot(rig)
    assert (load.active[slot], load.num_pending[slot], load.pending_tokens[slot]) == (2, 1, 160)
    assert (load.num_decoding[slot], load.context_tokens[slot], load.kv_tokens[slot]) == (1, 165, 325)


def test_a_reservation_lapses_on_a_worker_that_is_missing_as_anywhere() -> None:
    rig = Rig([worker("a"), worker("b")], reservation_ttl_s=5)
    rig.selector.reserve(rig.selector.select(rig.request(pinned_worker="a")))
    rig.selector.set_workers([worker("b")])
    rig.clock.advance(5.1)
    rig.selector.select(rig.request())
    rig.selector.set_workers([worker("a"), worker("b")])
    assert not rig.loads().any()
    assert not rig.selector.entries("r1")


def test_a_lease_ends_on_a_worker_that_never_returns() -> None:
    rig = Rig([worker("a"), worker("b")], lease_ttl_s=100)
    rig.place(rig.request(pinned_worker="a"))
    rig.selector.set_workers([worker("b")])
    rig.clock.advance(150)
    rig.selector.select(rig.request())
    assert not rig.selector.entries("r1")


def test_nothing_is_learned_from_a_request_whose_worker_was_missing_while_it_generated() -> None:
    rig = Rig([worker("a"), worker("b")])
    rig.learn()
    rig.place(rig.request(request_id="long", pinned_worker="a"))
    rig.selector.first_token("long", TOLD)
    _blink(rig, worker("b"))
    before = rig.selector.rates.slowness.tolist()
    rig.selector.free("long", Ended(True, 100, 1e6))
    assert rig.selector.rates.slowness.tolist() == before
