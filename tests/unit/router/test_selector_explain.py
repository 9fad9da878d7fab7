"""Every decision can be explained by request id, while it is remembered."""

from __future__ import annotations

import gc
import tracemalloc

import pytest

from kelp.core.types import Role
from kelp.router.decision.explain import Explanation
from kelp.router.decision.selector import Ended, FirstToken
from support.selector_rig import Rig, hashes, worker


def _explain(rig: Rig, request_id: str) -> Explanation:
    explanation = rig.selector.explain(request_id)
    assert explanation is not None
    return explanation


def test_an_unknown_request_has_no_explanation() -> None:
    assert Rig([worker("a")]).selector.explain("x") is None


def test_candidates_overlap_and_load_are_told_as_they_were_at_the_decision() -> None:
    rig = Rig([worker("a"), worker("b")], policy="dynamo")
    names = hashes(*range(10))
    rig.index.blocks[1] = set(names[:6])
    rig.place(rig.request(block_hashes=names, pinned_worker="a"))
    rig.place(rig.request(block_hashes=names))
    for _ in range(3):
        rig.place()
    explanation = _explain(rig, "r2")
    choice = explanation.choices[0]
    assert (explanation.policy, choice.role, choice.chosen) == ("dynamo", Role.AGGREGATED, "b")
    told = {
        each.worker_id: (each.overlap_blocks, each.num_active, each.pending_prefill_tokens, each.active_blocks)
        for each in choice.candidates
    }
    assert told == {"a": ([0], 1, 160, 10), "b": ([6], 0, 0, 0)}
    assert (explanation.num_prompt_tokens, explanation.num_prompt_blocks, explanation.attempt) == (160, 10, 1)


def test_overlap_is_told_by_tier_where_lower_tiers_hold_something() -> None:
    rig = Rig([worker("a")])
    rig.index.tiers[0] = (1, 3, 3, 7)
    rig.place()
    assert _explain(rig, "r1").choices[0].candidates[0].overlap_blocks == [1, 3, 3, 7]


def test_blocks_brought_up_stand_beside_those_that_were_to_be() -> None:
    rig = Rig([worker("a"), worker("b")])
    rig.index.tiers[1] = (1, 3, 3, 7)
    rig.place(rig.request(pinned_worker="b"))
    assert _explain(rig, "r1").outcome.onboarded_blocks is None
    rig.selector.first_token("r1", FirstToken(64, 0.0, 0.1, onboarded_blocks=(0, 2, 0, 1), onboard_s=0.01))
    explanation = _explain(rig, "r1")
    assert explanation.predicted_onboarded_blocks == [0, 2, 0, 4]
    assert explanation.outcome.onboarded_blocks == [0, 2, 0, 1]
    assert explanation.outcome.onboard_s == 0.01
    rig.place()
    assert _explain(rig, "r2").predicted_onboarded_blocks == []


def test_what_happened_stands_beside_what_was_predicted() -> None:
    rig = Rig([worker("a")])
    rig.learn()
    request = rig.request(1600)
    rig.place(request)
    rig.clock.advance(0.125)
    rig.selector.first_token(request.request_id, FirstToken(32, 0.025, 0.1))
    rig.selector.free(request.request_id, Ended(True, 11, 0.5))
    explanation = _explain(rig, request.request_id)
    assert explanation.is_measured
    assert explanation.predicted_ttft_s == pytest.approx(0.1, rel=0.3)
    outcome = explanation.outcome
    assert outcome.ttft_s == pytest.approx(0.125)
    assert (outcome.state, outcome.queue_s, outcome.prefill_s, outcome.num_cached_tokens) == (
        "completed",
        0.025,
        0.1,
        32,
    )
    assert (outcome.itl_s, outcome.num_output_tokens) == (0.05, 11)


def test_states_follow_the_request() -> None:
    rig = Rig([worker("a")])
    states = []
    decision = rig.selector.select(rig.request())
    states.append(_explain(rig, "r1").outcome.state)
    rig.selector.reserve(decision)
    states.append(_explain(rig, "r1").outcome.state)
    rig.selector.commit("r1")
    states.append(_explain(rig, "r1").outcome.state)
    rig.selector.first_token("r1", FirstToken(0, 0.0, 0.1))
    states.append(_explain(rig, "r1").outcome.state)
    rig.selector.free("r1", Ended(False))
    states.append(_explain(rig, "r1").outcome.state)
    assert states == ["selected", "reserved", "committed", "running", "failed"]


def test_both_choices_of_a_disaggregated_request_are_told_prefill_first() -> None:
    rig = Rig([worker("p", Role.PREFILL), worker("q", Role.PREFILL), worker("d", Role.DECODE)])
    rig.place()
    explanation = _explain(rig, "r1")
    assert [(choice.role, len(choice.candidates)) for choice in explanation.choices] == [
        (Role.PREFILL, 2),
        (Role.DECODE, 1),
    ]


def test_a_retry_counts_as_another_attempt() -> None:
    rig = Rig([worker("a")])
    rig.place(rig.request(request_id="same"))
    rig.place(rig.request(request_id="same"))
    assert _explain(rig, "same").attempt == 2


def test_workers_keep_their_names_in_old_decisions() -> None:
    rig = Rig([worker("a")])
    rig.place()
    rig.selector.set_workers([worker("z")])
    assert _explain(rig, "r1").choices[0].chosen == "a"


def test_the_oldest_decisions_are_forgotten_beyond_the_bound() -> None:
    rig = Rig([worker("a"), worker("b")], explained_bytes=12_000)
    for _ in range(5):
        rig.place()
    assert [rig.selector.explain(f"r{number}") is not None for number in range(1, 6)] == [False, False] + [True] * 3


@pytest.mark.parametrize("tiers", [None, (1, 2, 3, 4)])
@pytest.mark.parametrize("num_workers", [2, 256])
def test_what_decisions_take_is_what_they_are_taken_to_take(
    num_workers: int, tiers: tuple[int, int, int, int] | None
) -> None:
    roles = (Role.PREFILL, Role.DECODE)
    fleet = [worker(f"w{number}", roles[number % 2]) for number in range(num_workers)]
    forgetful, kept = Rig(fleet, explained_bytes=0), Rig(fleet, explained_bytes=1 << 40)
    for rig in (forgetful, kept) if tiers else ():
        rig.index.tiers = dict.fromkeys(range(num_workers), tiers)
    nothing = _bytes_after(forgetful)
    measured = _bytes_after(kept) - nothing
    estimated = kept.selector.num_explained_bytes
    # A decision among idle workers shares its zeros, and takes less.
    assert 0.5 * estimated < measured <= estimated


def _bytes_after(rig: Rig) -> int:
    """Memory that requests with long prompts have left behind."""
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(100):
            rig.run(rig.request(16_000))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_explanations_survive_json() -> None:
    rig = Rig([worker("a")])
    rig.run(rig.request())
    explanation = _explain(rig, "r1")
    assert Explanation.model_validate_json(explanation.model_dump_json()) == explanation
