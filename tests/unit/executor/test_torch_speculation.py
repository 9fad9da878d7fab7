"""Drafts in the engine: same tokens in fewer steps, and nobody pays for wrong ones."""

from collections.abc import Sequence

import numpy as np
import pytest
from counting_bench import Bench, reason, tokens

from kelp.core.types import FinishReason, Role
from kelp.executor.base import Completed, Tokens
from kelp.executor.batching.drafts import DraftContext
from kelp.executor.batching.speculation import SpeculationRules

EAGER = SpeculationRules(num_draft_tokens=3, row_cost=1 / 1000)
LOOP = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
"""With a model of period 8 every n-gram guess is right."""


class Wrong:
    """Always guesses, never right: the model counts upwards."""

    def propose(self, contexts: Sequence[DraftContext]) -> list[np.ndarray]:
        return [np.full(context.max_tokens, context.tokens[-1], np.int32) for context in contexts]


class BelowGuide:
    """Allows tokens below a limit."""

    error = ""
    is_finished = False

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.accepted: list[int] = []

    def allowed(self, draft: Sequence[int]) -> list[np.ndarray]:
        mask = np.asarray([(1 << self.limit) - 1], np.int32)
        num_allowed = next((index for index, token in enumerate(draft) if token >= self.limit), len(draft))
        return [mask] * (num_allowed + 1)

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def test_right_drafts_give_the_same_tokens_in_fewer_steps():
    plain, drafting = Bench(period=8), Bench(period=8, speculation=EAGER)
    for bench in (plain, drafting):
        events = bench.submit("a", 0, prompt=LOOP, max_tokens=30)
        bench.run()
        assert tokens(events) == [token % 8 for token in range(2, 32)]
        assert reason(events) is FinishReason.LENGTH
        assert bench.pool.num_held == 0
    assert len(plain.runner.batches) == 30
    assert len(drafting.runner.batches) < 12


def test_the_tokens_of_one_step_come_in_one_event_with_their_log_probs():
    bench = Bench(period=8, speculation=EAGER)
    bench.submit("a", 0, prompt=LOOP, max_tokens=9)
    bench.run()
    events = [event for event in bench.events["a"] if isinstance(event, Tokens)]
    assert max(len(event.token_ids) for event in events) == 4
    assert all(len(event.token_ids) == len(event.log_probs) for event in events)


@pytest.mark.parametrize("max_tokens", range(1, 10))
def test_drafts_never_lead_past_max_tokens(max_tokens):
    bench = Bench(period=8, speculation=EAGER)
    events = bench.submit("a", 0, prompt=LOOP, max_tokens=max_tokens)
    bench.run()
    assert len(tokens(events)) == max_tokens
    assert reason(events) is FinishReason.LENGTH


@pytest.mark.parametrize("stop", range(8))
def test_a_stop_id_among_right_drafts_is_the_last_token(stop):
    bench = Bench(period=8, speculation=EAGER)
    events = bench.submit("a", 0, prompt=LOOP, max_tokens=30, stop_token_ids=(stop,), min_tokens=4)
    bench.run()
    assert reason(events) is FinishReason.STOP
    assert tokens(events)[-1] == stop
    assert tokens(events)[3:].count(stop) == 1
    assert isinstance(bench.events["a"][-1], Completed)


def test_wrong_drafts_change_no_token_and_are_soon_given_up():
    bench = Bench(num_blocks=40, speculation=SpeculationRules(4), proposer=Wrong())
    events = bench.submit("a", 4, max_tokens=120, ignore_eos=True)
    bench.run()
    assert tokens(events) == [*range(4, 124)]
    load = bench.engine.load()
    assert load.num_accepted_tokens == 0
    assert 0 < load.num_draft_tokens < 20
    assert all(batch == [1] for batch in bench.runner.batches[20:])


def test_a_sequence_that_gave_drafts_up_resumes_when_its_text_begins_to_repeat():
    bench = Bench(num_blocks=80, speculation=SpeculationRules(4), period=40)
    bench.submit("a", 4, prompt=[7, 7, 90, 7, 7, 91, 7, 7, 92, 7, 7], max_tokens=250)
    (sequence,) = bench.engine._sequences.values()
    sequence.acceptance.observe(num_right=0, num_wrong=30)
    bench.run()
    assert all(batch == [1] for batch in bench.runner.batches[1:40])
    assert bench.engine.load().num_accepted_tokens > 100


def test_the_load_counts_drafts_and_those_that_were_right():
    bench = Bench(period=8, speculation=EAGER)
    bench.submit("a", 0, prompt=LOOP, max_tokens=9)
    bench.run()
    load = bench.engine.load()
    assert load.num_draft_tokens == load.num_accepted_tokens == 9 - len(bench.runner.batches)


def test_drafts_share_the_token_budget_and_yield_to_prompts():
    bench = Bench(num_blocks=32, budget=8, period=8, speculation=EAGER)
    bench.submit("a", 0, prompt=LOOP, max_tokens=30)
    bench.engine.step()
    bench.engine.step()
    bench.submit("b", 20, start=20, max_tokens=1)
    bench.run()
    assert all(sum(batch) <= 8 for batch in bench.runner.batches)
    assert [1, 7] in bench.runner.batches


def test_drafts_take_no_block_that_growth_needs():
    benches = [Bench(num_blocks=8, period=8, speculation=rules) for rules in (SpeculationRules(), EAGER)]
    for bench in benches:
        lives = [bench.submit(name, 0, prompt=LOOP, max_tokens=20) for name in "ab"]
        bench.run()
        assert all(tokens(events) == [token % 8 for token in range(2, 22)] for events in lives)
    plain, drafting = (bench.engine.load().num_preemptions for bench in benches)
    assert drafting <= plain


def test_rejected_drafts_never_enter_the_prefix_cache():
    bench = Bench(num_blocks=40, speculation=EAGER, proposer=Wrong())
    first = bench.submit("a", 4, max_tokens=30, ignore_eos=True)
    bench.run()
    again = bench.submit("b", 0, prompt=[*range(4), *tokens(first)], max_tokens=1)
    bench.run()
    assert again[-1].usage.cached_tokens == 32
    wrong = bench.submit("c", 0, prompt=[*range(5), *[4] * 20], max_tokens=1)
    bench.run()
    assert wrong[-1].usage.cached_tokens == 4


def test_a_prefill_has_nothing_to_draft_for():
    bench = Bench(period=8, speculation=EAGER)
    bench.submit("a", 0, Role.PREFILL, prompt=LOOP, max_tokens=30)
    bench.run()
    assert bench.runner.batches == [[10]]


def test_a_guide_cuts_a_draft_at_the_token_that_it_refuses():
    bench = Bench(period=8, speculation=EAGER)
    guide = BelowGuide(limit=6)
    events = bench.submit("a", 0, prompt=LOOP, max_tokens=4, guide=guide)
    bench.run()
    assert bench.runner.batches[:2] == [[10], [3]]
    assert tokens(events) == guide.accepted == [2, 3, 4, 5]
    points = bench.runner.launches[1][0].samples
    assert all(point.allowed is not None for point in points)
    assert [len(point.tokens) for point in points] == [11, 12, 13]


def worthwhile(bench: Bench, rate: float, num_decodes: int) -> int:
    bench.submit(f"{rate}/{num_decodes}", 4, max_tokens=40)
    sequence = [*bench.engine._sequences.values()][-1]
    sequence.acceptance.rate = rate
    return bench.engine._speculation.num_worthwhile(sequence, num_decodes)


def test_larger_batches_and_worse_guesses_get_fewer_drafts():
    bench = Bench(speculation=SpeculationRules(8, row_cost=1 / 16))
    table = [[worthwhile(bench, rate, num) for num in (1, 8, 32)] for rate in (0.1, 0.5, 0.9, 0.999)]
    assert table == [[1, 0, 0], [4, 1, 0], [8, 8, 3], [8, 8, 8]]
