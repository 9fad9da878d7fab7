"""What became of a request."""

from __future__ import annotations

import pytest

from kelp.chaos.verdict import Expectation, Judgement, Outcome, Seen, Tally, judge, num_wrong_tokens

RIGHT = ((1, 2, 3, 4),)


@pytest.mark.parametrize(
    ("seen", "is_whole", "count"),
    [
        ([1, 2, 3, 4], True, 0),
        ([1, 2], False, 0),
        ([1, 2], True, 2),
        ([1, 9, 3, 4], True, 1),
        ([1, 2, 2, 3], False, 2),
        ([1, 2, 3, 4, 5], False, 1),
    ],
)
def test_wrong_tokens_are_those_that_differ_go_beyond_or_lack(seen: list[int], is_whole: bool, count: int) -> None:
    assert num_wrong_tokens(RIGHT[0], seen, is_whole) == count


@pytest.mark.parametrize(
    ("expectation", "seen", "outcome"),
    [
        (Expectation.ANSWER, Seen({0: RIGHT[0]}), Outcome.COMPLETED),
        (Expectation.ANSWER, Seen({0: (1, 2)}), Outcome.WRONG),
        (Expectation.ANSWER, Seen({0: (1, 2)}, "WORKER_LOST"), Outcome.FAILED),
        (Expectation.ANSWER, Seen({0: (1, 7)}, "WORKER_LOST"), Outcome.WRONG),
        (Expectation.ANSWER, Seen({}, "OVERLOADED"), Outcome.SHED),
        (Expectation.ANSWER, Seen({0: (1, 2)}, "OVERLOADED", has_begun=True), Outcome.FAILED),
        (Expectation.ANSWER, Seen({}, "OVERLOADED", num_asked=2, has_begun=True), Outcome.FAILED),
        (Expectation.ANSWER, Seen({}, "NO_WORKER"), Outcome.FAILED),
        (Expectation.ANSWER, Seen({}, "DEADLINE_EXCEEDED"), Outcome.FAILED),
        (Expectation.ANSWER, Seen({0: (1, 2)}, is_hung=True), Outcome.HUNG),
        (Expectation.ANSWER, Seen({0: RIGHT[0], 1: (5,)}), Outcome.WRONG),
        (Expectation.LEAVES, Seen({0: (1, 2)}), Outcome.LEFT),
        (Expectation.LEAVES, Seen({0: (1, 3)}), Outcome.WRONG),
        (Expectation.LEAVES, Seen({}, "INTERNAL"), Outcome.FAILED),
        (Expectation.DEADLINE, Seen({0: (1,)}, "DEADLINE_EXCEEDED"), Outcome.EXPIRED),
        (Expectation.DEADLINE, Seen({0: RIGHT[0]}), Outcome.COMPLETED),
        (Expectation.DEADLINE, Seen({}, "INTERNAL"), Outcome.FAILED),
        (Expectation.DEADLINE, Seen({}, "UNAVAILABLE", is_unreached=True), Outcome.EXPIRED),
        (Expectation.ANSWER, Seen({}, "UNAVAILABLE", is_unreached=True), Outcome.FAILED),
        (Expectation.REFUSAL, Seen({}, "INVALID_ARGUMENT"), Outcome.REFUSED),
        (Expectation.REFUSAL, Seen({}, "UNTYPED", "unexpected shape for input 'max_tokens'"), Outcome.REFUSED),
        (Expectation.REFUSAL, Seen({}, "UNTYPED", "Socket closed"), Outcome.FAILED),
        (Expectation.REFUSAL, Seen({}, "INTERNAL"), Outcome.FAILED),
    ],
)
def test_what_is_judged_depends_on_what_was_expected(expectation: Expectation, seen: Seen, outcome: Outcome) -> None:
    assert judge(expectation, RIGHT, seen).outcome is outcome


def test_bad_input_that_is_answered_is_a_failure() -> None:
    assert judge(Expectation.REFUSAL, (), Seen({})).outcome is Outcome.FAILED


def test_a_tally_counts_failures_by_code_and_shares_without_what_was_not_to_be_answered() -> None:
    tally = Tally()
    for outcome, code in (
        (Outcome.COMPLETED, ""),
        (Outcome.COMPLETED, ""),
        (Outcome.COMPLETED, ""),
        (Outcome.FAILED, "WORKER_LOST"),
        (Outcome.SHED, "OVERLOADED"),
        (Outcome.LEFT, ""),
        (Outcome.REFUSED, "NOT_SUPPORTED"),
    ):
        tally.add(Judgement(outcome, code))
    tally.add(Judgement(Outcome.EXPIRED, "DEADLINE_EXCEEDED", num_asked=2))
    assert tally.num_requests == 8
    assert tally.completed_share == 0.75
    assert dict(tally.failed_by_code) == {"WORKER_LOST": 1}
    assert tally.num_asked_again == 1


def test_a_tally_of_nothing_has_lost_nothing() -> None:
    assert Tally().completed_share == 1.0
