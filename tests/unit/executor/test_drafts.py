"""Guesses from repeated text, and what is made of their success."""

import numpy as np
import pytest

from kelp.executor.batching.drafts import Acceptance, DraftContext, NgramProposer


def guess(tokens: list[int], max_tokens: int = 3) -> list[int]:
    (draft,) = NgramProposer().propose([DraftContext("a", np.asarray(tokens, np.int32), max_tokens)])
    return draft.tolist()


@pytest.mark.parametrize(
    ("tokens", "draft"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5]),
        ([1, 2, 8, 1, 2, 9, 7, 6, 1, 2], [9, 7, 6]),
        ([4, 1, 2, 8, 8, 8, 1, 2, 9, 4, 1, 2], [8, 8, 8]),
        ([6, 7, 6, 7], [6, 7, 6]),
        ([5, 5, 5], [5, 5, 5]),
    ],
    ids=["what followed", "the most recent", "the longest match first", "a loop goes round", "a loop of one"],
)
def test_text_is_expected_to_go_on_as_it_did_before(tokens, draft):
    assert guess(tokens) == draft


@pytest.mark.parametrize("tokens", [[1], [1, 1], [1, 2], [2, 1, 3, 1], [1, 2, 3, 4, 5]])
def test_a_match_of_fewer_than_two_tokens_is_no_ground_for_a_guess(tokens):
    assert guess(tokens) == []


def test_matches_longer_than_four_tokens_rank_by_recency():
    run = [1, 2, 3, 4, 5]
    assert guess([*run, 7, 2, 3, 4, 5, 8, *run]) == [8, 1, 2]


def test_no_more_is_guessed_than_is_of_use():
    assert guess([1, 2, 3, 4, 5, 1, 2], max_tokens=1) == [3]


def test_a_batch_is_answered_in_order():
    contexts = [DraftContext(str(start), np.asarray([start, 8, 9, start, 8], np.int32), 1) for start in (3, 4)]
    assert [draft.tolist() for draft in NgramProposer().propose(contexts)] == [[9], [9]]


def test_an_acceptance_rate_follows_what_happens():
    acceptance = Acceptance()
    start = acceptance.rate
    acceptance.observe(num_right=3, num_wrong=0)
    assert start < acceptance.rate < 1
    for _ in range(20):
        acceptance.observe(num_right=0, num_wrong=1)
    assert 0 < acceptance.rate < 0.01
