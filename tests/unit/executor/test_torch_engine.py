"""Lives of single requests: budget, preemption, ends."""

import pytest
from counting_bench import EOS, Bench, reason, tokens

from kelp.core.errors import DeadlineExceeded, InternalError
from kelp.core.types import FinishReason, Role
from kelp.executor.base import (
    Completed,
    Failed,
)


def test_max_tokens_ends_a_sequence_with_length():
    bench = Bench()
    events = bench.submit("a", 3, max_tokens=4)
    bench.run()
    assert tokens(events) == [3, 4, 5, 6]
    assert reason(events) is FinishReason.LENGTH
    assert bench.retired == ["a"]


def test_the_stop_token_is_emitted_and_ends_the_sequence():
    bench = Bench()
    events = bench.submit("a", 3, start=46, max_tokens=9)
    bench.run()
    assert tokens(events) == [49, EOS]
    assert reason(events) is FinishReason.STOP


def test_a_requests_own_stop_id_ends_it():
    bench = Bench()
    events = bench.submit("a", 3, max_tokens=9, stop_token_ids=(4,))
    bench.run()
    assert tokens(events) == [3, 4]
    assert reason(events) is FinishReason.STOP


def test_stopping_wins_when_the_last_allowed_token_is_a_stop_token():
    bench = Bench()
    events = bench.submit("a", 3, max_tokens=2, stop_token_ids=(4,))
    bench.run()
    assert reason(events) is FinishReason.STOP


def test_ignore_eos_keeps_own_stop_ids_in_force():
    bench = Bench()
    events = bench.submit("a", 3, start=46, max_tokens=9, ignore_eos=True, stop_token_ids=(52,))
    bench.run()
    assert tokens(events) == [49, 50, 51, 52]


def test_decodes_go_before_prompt_chunks_under_one_budget():
    bench = Bench(budget=8)
    bench.submit("a", 3, max_tokens=5)
    bench.engine.step()
    bench.submit("b", 20, start=20, max_tokens=1)
    for _ in range(3):
        bench.engine.step()
    assert bench.runner.batches == [[3], [1, 7], [1, 7], [1, 6]]


def test_no_more_than_max_running_sequences_hold_a_slot():
    bench = Bench(max_running=2)
    for name in "abc":
        bench.submit(name, 2, max_tokens=3)
    bench.engine.step()
    load = bench.engine.load()
    assert (load.num_running, load.num_waiting) == (2, 1)


def test_the_latest_arrival_is_preempted_and_finishes_later():
    bench = Bench(num_blocks=4)
    first = bench.submit("a", 4, max_tokens=12, ignore_eos=True)
    second = bench.submit("b", 4, start=20, max_tokens=12, ignore_eos=True)
    bench.run()
    assert bench.engine.load().num_preemptions > 0
    assert bench.retired == ["a", "b"]
    assert tokens(first) == [*range(4, 16)]
    assert tokens(second) == [*range(24, 36)]


def test_a_running_prefill_is_never_preempted_even_by_an_earlier_request():
    bench = Bench(num_blocks=5, budget=3, max_running=2)
    grown = bench.submit("a", 4, max_tokens=13)
    exported = bench.submit("b", 12, Role.PREFILL, start=20)
    bench.run()
    assert bench.engine.load().num_preemptions == 1
    assert reason(exported) is None
    assert not isinstance(grown[-1], Completed)
    bench.engine.release_export("b")
    bench.run()
    assert tokens(grown) == [*range(4, 17)]


def test_a_request_that_waits_for_leased_blocks_runs_once_they_are_released():
    bench = Bench(num_blocks=4)
    bench.submit("a", 12, Role.PREFILL, max_tokens=2)
    waiting = bench.submit("b", 8, start=20, max_tokens=2)
    bench.run()
    assert waiting == []
    assert not bench.engine.step()
    bench.engine.release_export("a")
    bench.run()
    assert tokens(waiting) == [28, 29]


@pytest.mark.parametrize("role", [Role.AGGREGATED, Role.PREFILL, Role.DECODE])
def test_a_deadline_passed_while_waiting_fails_the_request(role):
    bench = Bench()
    events = bench.submit("a", 4, role, deadline_s=bench.clock.monotonic_s() + 5)
    assert bench.engine.seconds_to_wake() == 5
    bench.clock.advance(5)
    bench.run()
    assert isinstance(events[-1], Failed) and isinstance(events[-1].error, DeadlineExceeded)
    assert bench.retired == ["a"]
    assert bench.engine.seconds_to_wake() is None


def test_a_deadline_passed_while_decoding_frees_the_blocks():
    bench = Bench()
    events = bench.submit("a", 4, max_tokens=40, deadline_s=bench.clock.monotonic_s() + 5)
    bench.engine.step()
    bench.clock.advance(6)
    bench.engine.step()
    assert isinstance(events[-1], Failed)
    assert bench.pool.num_held == 0


def test_an_abort_while_waiting_or_running_frees_everything():
    bench = Bench(max_running=1)
    running, waiting = bench.submit("a", 4, max_tokens=9), bench.submit("b", 4)
    bench.engine.step()
    for name in "ab":
        bench.engine.abort(name)
    assert reason(running) is reason(waiting) is FinishReason.CANCELLED
    assert bench.pool.num_held == 0
    assert bench.retired == ["a", "b"]


def test_giving_everything_up_fails_live_requests_and_keeps_leases():
    bench = Bench(max_running=2)
    leased = bench.submit("a", 4, Role.PREFILL)
    bench.run()
    live = [bench.submit("b", 4, max_tokens=9), bench.submit("c", 4, Role.DECODE), bench.submit("d", 4)]
    bench.engine.step()
    bench.engine.fail_all(InternalError("broken"))
    assert all(isinstance(events[-1], Failed) for events in live)
    assert reason(leased) is None
    bench.engine.release_export("a")
    bench.engine.end_import("c")
    assert bench.pool.num_held == 0


def test_commands_for_unknown_requests_are_ignored():
    bench = Bench()
    bench.engine.abort("x")
    bench.engine.complete_import("x", 1, 0.0, 0)
    bench.engine.fail_import("x")
    bench.engine.end_import("x")
    bench.engine.release_export("x")
    assert not bench.engine.step()
