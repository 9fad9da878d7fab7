"""Exports and imports of single requests: what stays held, and until when."""

import pytest
from counting_bench import EOS, Bench, reason, tokens

from kelp.core.errors import ProtocolError
from kelp.core.types import FinishReason, Role
from kelp.executor.base import (
    Completed,
    Failed,
    Reserved,
)


def test_a_deadline_passed_during_an_import_keeps_the_blocks_until_the_transfer_ended():
    bench = Bench()
    events = bench.submit("a", 4, Role.DECODE, deadline_s=bench.clock.monotonic_s() + 5)
    bench.run()
    bench.clock.advance(6)
    bench.run()
    assert isinstance(events[-1], Failed)
    assert bench.pool.num_held == 1
    bench.engine.end_import("a")
    assert bench.pool.num_held == 0


def test_an_aborted_import_is_quarantined_until_end_import():
    bench = Bench()
    events = bench.submit("a", 8, Role.DECODE)
    bench.run()
    bench.engine.abort("a")
    assert reason(events) is FinishReason.CANCELLED
    assert bench.pool.num_held == 2
    assert bench.retired == []
    bench.engine.end_import("a")
    assert bench.pool.num_held == 0
    assert bench.pool.num_cached == 0


@pytest.mark.parametrize("is_complete", [True, False])
def test_the_end_of_a_transfer_after_an_abort_ends_the_quarantine(is_complete):
    bench = Bench()
    bench.submit("a", 8, Role.DECODE)
    bench.run()
    bench.engine.abort("a")
    if is_complete:
        bench.engine.complete_import("a", 3, -1.0, 2)
    else:
        bench.engine.fail_import("a")
    assert bench.retired == ["a"]
    bench.engine.end_import("a")
    assert bench.pool.num_free == bench.pool.num_blocks


def test_an_import_takes_no_part_in_steps_until_complete():
    bench = Bench()
    events = bench.submit("a", 6, Role.DECODE, max_tokens=3)
    bench.run()
    assert isinstance(events[-1], Reserved) and len(events[-1].block_ids) == 2
    assert bench.runner.batches == []
    bench.engine.complete_import("a", 6, -1.0, 2)
    bench.run()
    assert tokens(events) == [7, 8]
    assert bench.runner.batches == [[1], [1]]


@pytest.mark.parametrize(
    ("first", "max_tokens", "expected"), [(EOS, 9, FinishReason.STOP), (7, 1, FinishReason.LENGTH)]
)
def test_a_first_token_that_ends_the_sequence_completes_an_import_at_once(first, max_tokens, expected):
    bench = Bench()
    events = bench.submit("a", 6, Role.DECODE, max_tokens=max_tokens)
    bench.run()
    bench.engine.complete_import("a", first, -1.0, 2)
    assert reason(events) is expected
    assert tokens(events) == []
    assert bench.pool.num_held == 0


def test_a_first_token_outside_the_vocabulary_fails_the_import():
    bench = Bench()
    events = bench.submit("a", 6, Role.DECODE)
    bench.run()
    bench.engine.complete_import("a", 100, -1.0, 2)
    assert isinstance(events[-1], Failed) and isinstance(events[-1].error, ProtocolError)
    assert bench.pool.num_held == 0
    assert bench.pool.num_cached == 0


@pytest.mark.parametrize(("stop", "expected"), [((), None), ((6,), FinishReason.STOP)])
def test_a_prefill_says_whether_decode_shall_go_on(stop, expected):
    bench = Bench()
    events = bench.submit("a", 6, Role.PREFILL, stop_token_ids=stop)
    bench.run()
    assert reason(events) is expected
    assert tokens(events) == [6]


def test_a_prefill_released_while_running_is_unpinned_at_its_end():
    bench = Bench(budget=8)
    bench.submit("a", 12, Role.PREFILL)
    bench.engine.step()
    bench.engine.release_export("a")
    assert bench.pool.num_held == 3
    bench.run()
    assert bench.pool.num_held == 0
    assert bench.retired == ["a"]


def test_an_aborted_prefill_keeps_its_blocks_until_release_export():
    bench = Bench(budget=8)
    events = bench.submit("a", 12, Role.PREFILL)
    bench.engine.step()
    bench.engine.abort("a")
    assert reason(events) is FinishReason.CANCELLED
    assert bench.pool.num_held == 3
    bench.engine.release_export("a")
    assert bench.pool.num_held == 0


def test_an_aborted_prefill_that_announced_nothing_is_freed_at_once():
    bench = Bench(budget=8)
    bench.submit("a", 6, max_tokens=9)
    events = bench.submit("b", 12, Role.PREFILL, start=20)
    bench.engine.step()
    assert bench.runner.batches == [[6, 2]]
    assert bench.pool.num_held == 5
    bench.engine.abort("b")
    assert reason(events) is FinishReason.CANCELLED
    assert bench.pool.num_held == 2
    assert bench.retired == ["b"]


def test_aborting_a_leased_prefill_changes_nothing():
    bench = Bench()
    events = bench.submit("a", 4, Role.PREFILL)
    bench.run()
    bench.engine.abort("a")
    assert reason(events) is None
    assert bench.pool.num_held == 1


def test_timings_and_usage_tell_the_life_of_a_request():
    bench = Bench()
    events = bench.submit("a", 6, Role.DECODE, max_tokens=3)
    bench.run()
    bench.clock.advance(2)
    bench.engine.complete_import("a", 6, -1.0, 2)
    bench.run()
    end = events[-1]
    assert isinstance(end, Completed)
    assert end.usage.transferred_blocks == 2
    assert end.usage.new_blocks == 2
    assert end.timings.transfer_done_ns - end.timings.transfer_start_ns == 2_000_000_000
    assert end.timings.first_token_ns >= end.timings.transfer_done_ns
