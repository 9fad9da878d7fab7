"""Requests beside each other: who computes what once, and who waits for whom."""

import pytest
from counting_bench import Bench, reason, tokens

from kelp.core.types import FinishReason, Role
from kelp.executor.base import Admitted, Completed, Reserved


def num_inputs(bench: Bench) -> int:
    return sum(sum(batch) for batch in bench.runner.batches)


def test_identical_prompts_submitted_at_once_compute_their_full_blocks_once():
    bench = Bench(num_blocks=64, budget=16)
    lives = [bench.submit(str(number), 40, max_tokens=2) for number in range(5)]
    bench.run()
    # 40 tokens are 10 blocks; the last one is computed by everybody, for its logits, and each decodes once.
    assert num_inputs(bench) == 40 + 4 * 4 + 5
    assert all(tokens(events) == [40, 41] for events in lives)
    assert [events[-1].usage.cached_tokens for events in lives] == [0, 36, 36, 36, 36]


def test_prompts_that_share_a_beginning_compute_it_once():
    bench = Bench(num_blocks=64, budget=16)
    for number in range(3):
        bench.submit(str(number), 0, prompt=[*range(20), *[60 + number] * 6], max_tokens=1)
    bench.run()
    assert num_inputs(bench) == 26 + 6 + 6


def test_others_pass_a_request_that_waits_for_a_block():
    bench = Bench(num_blocks=64, budget=8)
    bench.submit("maker", 40, max_tokens=1)
    waiter = bench.submit("waiter", 40, max_tokens=1)
    other = bench.submit("other", 4, start=60, max_tokens=1)
    for _ in range(2):
        bench.engine.step()
    assert waiter == []
    assert tokens(other) == [64]
    bench.run()
    assert tokens(waiter) == [40]


def test_without_a_maker_the_waiting_request_computes_itself():
    bench = Bench(num_blocks=64, budget=8)
    bench.submit("maker", 40, max_tokens=1)
    lives = [bench.submit(name, 40, max_tokens=1) for name in ("waiter", "last")]
    bench.engine.step()
    bench.engine.abort("maker")
    bench.run()
    assert all(tokens(events) == [40] for events in lives)
    assert num_inputs(bench) == 40 + 4


def test_a_preempted_maker_keeps_nobody_waiting():
    bench = Bench(num_blocks=6, budget=4, max_running=3)
    first = bench.submit("first", 4, max_tokens=13)
    maker = bench.submit("maker", 12, start=20, max_tokens=2)
    waiter = bench.submit("waiter", 12, start=20, max_tokens=2)
    bench.run()
    assert bench.engine.load().num_preemptions > 0
    assert tokens(first) == [*range(4, 17)]
    assert tokens(maker) == tokens(waiter) == [32, 33]


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_request_waits_for_an_import_of_the_same_prompt(is_lost):
    bench = Bench(num_blocks=16)
    bench.submit("import", 8, Role.DECODE, max_tokens=3)
    waiter = bench.submit("waiter", 8, max_tokens=3)
    bench.run()
    assert waiter == []
    if is_lost:
        bench.engine.fail_import("import")
    else:
        bench.engine.complete_import("import", 8, -0.5, 2)
    bench.run()
    assert tokens(waiter) == [8, 9, 10]
    assert waiter[-1].usage.cached_tokens == 4


def test_an_aborted_import_keeps_nobody_waiting():
    bench = Bench(num_blocks=16)
    bench.submit("import", 8, Role.DECODE, max_tokens=3)
    waiter = bench.submit("waiter", 8, max_tokens=3)
    bench.engine.step()
    bench.engine.abort("import")
    bench.run()
    assert tokens(waiter) == [8, 9, 10]
    bench.engine.end_import("import")
    assert bench.pool.num_held == 0


def test_an_import_that_takes_its_time_keeps_nobody_waiting():
    bench = Bench(num_blocks=16)
    bench.submit("import", 8, Role.DECODE, max_tokens=3)
    waiters = [bench.submit("waiter", 8, max_tokens=3), bench.submit("second", 8, Role.DECODE, max_tokens=3)]
    bench.run()
    assert waiters == [[], []]
    assert bench.engine.seconds_to_wake() == 1
    bench.clock.advance(1)
    bench.run()
    assert tokens(waiters[0]) == [8, 9, 10]
    assert isinstance(waiters[1][-1], Reserved)
    assert bench.engine.seconds_to_wake() is None


def test_equal_imports_transfer_their_full_blocks_once():
    bench = Bench(num_blocks=16)
    lives = [bench.submit(name, 10, Role.DECODE, max_tokens=3) for name in "ab"]
    bench.run()
    assert [len(events) for events in lives] == [2, 0]
    bench.engine.complete_import("a", 10, -0.5, 3)
    bench.run()
    (reserved,) = [event for event in lives[1] if isinstance(event, Reserved)]
    assert (len(reserved.block_ids), reserved.num_cached_blocks) == (3, 2)


def test_a_short_prompt_is_not_held_up_by_a_long_one():
    bench = Bench(num_blocks=256, budget=16)
    long = bench.submit("long", 800, prompt=[70] * 800, max_tokens=1)
    bench.engine.step()
    short = bench.submit("short", 20, max_tokens=1)
    for _ in range(5):
        bench.engine.step()
    assert tokens(short) == [20]
    assert reason(short) is FinishReason.LENGTH
    bench.run()
    assert isinstance(long[-1], Completed)
    assert len(bench.runner.batches) == -(-820 // 16)


def test_a_prompt_is_admitted_as_soon_as_there_are_blocks_for_it():
    bench = Bench(num_blocks=64, budget=8)
    bench.submit("long", 100, prompt=[70] * 100, max_tokens=1)
    later = bench.submit("later", 100, prompt=[80] * 100, max_tokens=1)
    bench.engine.step()
    assert isinstance(later[0], Admitted)
    assert bench.runner.batches == [[8]]
