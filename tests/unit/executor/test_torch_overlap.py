"""Two steps in flight: planned ahead where that is safe, and nothing freed that a step may still touch."""

from collections.abc import Sequence

import pytest
from counting_bench import EOS, Bench, CountingRunner, reason, tokens

from kelp.core.errors import InternalError
from kelp.core.types import FinishReason, Role
from kelp.executor.base import Completed, Failed
from kelp.executor.batching.batch import Chunk, Finished, Sampled
from kelp.executor.batching.speculation import SpeculationRules


class FailingStep:
    def result(self) -> list[Sampled]:
        raise RuntimeError("device lost")


def sources(bench: Bench) -> list[list[int | None]]:
    return [[chunk.token_source for chunk in chunks] for chunks in bench.runner.launches]


def test_the_next_step_takes_its_tokens_from_the_one_in_flight():
    bench = Bench(max_in_flight=2)
    lives = [bench.submit("a", 3, max_tokens=4), bench.submit("b", 5, start=20, max_tokens=4)]
    bench.run()
    assert [tokens(events) for events in lives] == [[3, 4, 5, 6], [25, 26, 27, 28]]
    assert sources(bench) == [[None, None], [0, 1], [0, 1], [0, 1]]
    assert bench.pool.num_held == 0


def test_prompt_chunks_follow_each_other_without_waiting():
    bench = Bench(budget=8, max_in_flight=2)
    events = bench.submit("a", 20, max_tokens=2)
    for _ in range(2):
        bench.engine.step()
    assert bench.runner.batches == [[8], [8]]
    bench.run()
    assert tokens(events) == [20, 21]


def test_the_row_after_a_stop_token_is_discarded_and_its_block_held_until_it_has_landed():
    bench = Bench(max_in_flight=2)
    events = bench.submit("a", 3, start=46, max_tokens=9)
    while not events or not isinstance(events[-1], Completed):
        bench.engine.step()
    assert tokens(events) == [49, EOS]
    assert len(bench.runner.batches) == 3
    assert bench.pool.num_held > 0
    assert bench.retired == []
    bench.run()
    assert bench.pool.num_held == 0
    assert bench.retired == ["a"]
    assert tokens(events) == [49, EOS]


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.5},
        {"bad_words_ids": ((7, 8),)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_choice_that_depends_on_the_last_token_waits_for_it(fields):
    bench = Bench(max_in_flight=2)
    events = bench.submit("a", 3, max_tokens=5, **fields)
    other = bench.submit("b", 3, start=20, max_tokens=5)
    bench.run()
    assert tokens(events) == [3, 4, 5, 6, 7]
    assert tokens(other) == [23, 24, 25, 26, 27]
    (name,) = fields
    for chunks in bench.runner.launches:
        dependent = [chunk for chunk in chunks if getattr(chunk.samples[0].params, name) == fields[name]]
        assert all(chunk.token_source is None for chunk in dependent)
    assert any(source is not None for step in sources(bench) for source in step)


def test_min_tokens_needs_the_number_of_tokens_only():
    bench = Bench(max_in_flight=2)
    bench.submit("a", 3, max_tokens=4, min_tokens=3)
    bench.run()
    assert sources(bench)[1:] == [[0], [0], [0]]
    assert [len(chunk.samples[0].output) for (chunk,) in bench.runner.launches] == [0, 1, 2, 3]


def test_a_sequence_with_drafts_waits_for_its_token_and_goes_on():
    rules = SpeculationRules(num_draft_tokens=3, row_cost=1 / 1000)
    bench = Bench(max_in_flight=2, period=8, speculation=rules)
    events = bench.submit("a", 0, prompt=[*range(8), 0, 1], max_tokens=20)
    bench.run()
    assert tokens(events) == [token % 8 for token in range(2, 22)]
    assert bench.engine.load().num_accepted_tokens > 5


def test_an_aborted_request_ends_at_once_and_keeps_its_blocks_until_its_step_has_landed():
    bench = Bench(max_in_flight=2)
    events = bench.submit("a", 4, max_tokens=40)
    bench.engine.step()
    bench.engine.abort("a")
    assert reason(events) is FinishReason.CANCELLED
    assert (bench.pool.num_held, bench.retired) == (1, [])
    bench.run()
    assert (bench.pool.num_held, bench.retired) == (0, ["a"])


def test_a_released_lease_keeps_its_blocks_until_its_step_has_landed():
    bench = Bench(budget=4, max_in_flight=2)
    bench.submit("a", 12, Role.PREFILL)
    for _ in range(2):
        bench.engine.step()
    bench.engine.abort("a")
    bench.engine.release_export("a")
    assert (bench.pool.num_held, bench.retired) == (3, [])
    bench.run()
    assert (bench.pool.num_held, bench.retired) == (0, ["a"])


def test_preemption_waits_until_nothing_is_in_flight():
    bench = Bench(num_blocks=4, max_in_flight=2)
    first = bench.submit("a", 4, max_tokens=12, ignore_eos=True)
    second = bench.submit("b", 4, start=20, max_tokens=12, ignore_eos=True)
    bench.run()
    assert bench.engine.load().num_preemptions > 0
    assert tokens(first) == [*range(4, 16)]
    assert tokens(second) == [*range(24, 36)]


def test_a_step_that_fails_in_flight_fails_the_requests_and_frees_their_blocks():
    class Failing(CountingRunner):
        def launch(self, chunks: Sequence[Chunk]) -> Finished:
            finished = super().launch(chunks)
            return finished if len(self.batches) > 2 else FailingStep()

    bench = Bench(max_in_flight=2)
    bench.engine._steps._flights._runner = Failing()
    events = bench.submit("a", 4, max_tokens=40)
    bench.engine.step()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="device lost"):
            bench.engine.step()
        bench.engine.fail_all(InternalError("broken"))
    assert isinstance(events[-1], Failed)
    assert (bench.pool.num_held, bench.retired) == (0, ["a"])
    healthy = bench.submit("b", 4, max_tokens=2)
    bench.run()
    assert tokens(healthy) == [4, 5]


def test_landing_everything_leaves_nothing_in_flight():
    bench = Bench(max_in_flight=2)
    events = bench.submit("a", 4, max_tokens=40)
    bench.engine.step()
    bench.engine.fail_all(InternalError("closing"))
    bench.engine.land_all()
    assert isinstance(events[-1], Failed)
    assert bench.retired == ["a"]


def test_a_late_row_is_written_before_a_transfer_gets_its_block():
    bench = Bench(num_blocks=2, max_in_flight=2)
    bench.submit("a", 4, max_tokens=4)
    for _ in range(2):
        bench.engine.step()
    bench.engine.abort("a")
    imported = bench.submit("b", 8, Role.DECODE, start=20)
    bench.engine.step()
    assert imported == []
    bench.run()
    assert len(imported) == 2
