"""Several tokens at once are the same as one after the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import FinishReason, Role
from kelp.executor.base import ExecutorRequest
from kelp.executor.batching.batch import SamplePoint, SamplePoints
from kelp.executor.batching.history import History, SequenceRules

STOP = 3


def history(max_tokens: int, min_tokens: int = 0) -> History:
    request = ExecutorRequest(
        request_id="a",
        prompt=np.array([7, 8, 9], np.int32),
        role=Role.AGGREGATED,
        sampling=SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=(STOP,)),
        seed_hash=seed_hash("m"),
        sink=lambda _: None,
    )
    return History(request, SequenceRules(4, ()), guide=None)


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(0, 6),
)
def test_a_sequence_ends_at_the_same_token_however_many_come_at_once(
    pieces: list[list[int]], max_tokens: int, min_tokens: int
) -> None:
    at_once, one_by_one = history(max_tokens, min_tokens), history(max_tokens, min_tokens)
    for piece in pieces:
        num_new, reason = at_once.extend(piece)
        for token_id in piece[:num_new]:
            expected = one_by_one.append(token_id)
        assert (reason, at_once.known.tolist()) == (expected, one_by_one.known.tolist())
        assert reason is not None or num_new == len(piece)
        if reason is not None:
            return


def test_no_token_more_than_asked_for_is_taken() -> None:
    short = history(max_tokens=2)
    assert short.extend([4, 5, 6]) == (2, FinishReason.LENGTH)
    assert short.known.tolist() == [7, 8, 9, 4, 5]


@pytest.mark.parametrize(("token_ids", "num_right"), [([4, 5], 2), ([4, 6], 1), ([5, 4], 0), ([], 0)])
def test_guesses_count_up_to_the_first_wrong_one(token_ids: list[int], num_right: int) -> None:
    guessing = history(max_tokens=6)
    guessing.put_drafts(np.array([4, 5], np.int32))
    assert guessing.num_right_drafts(token_ids) == num_right


def test_sample_points_know_the_tokens_before_each_of_them() -> None:
    guessing = history(max_tokens=6)
    guessing.put_drafts(np.array([4, 5], np.int32))
    points = guessing.sample_points(3, 2)
    assert [point.tokens.tolist() for point in points] == [[7, 8, 9], [7, 8, 9, 4], [7, 8, 9, 4, 5]]
    assert [point.output.tolist() for point in points] == [[], [4], [4, 5]]
    assert {point.allowed for point in points} == {None}
    assert points[0].tokens.tolist() == points[-3].tokens.tolist() == [7, 8, 9]
    assert [len(point.tokens) for point in points[1:]] == [4, 5]


@pytest.mark.parametrize("index", [3, -4])
def test_there_is_no_sample_point_beyond_the_last(index: int) -> None:
    with pytest.raises(IndexError, match="of 3"):
        history(max_tokens=6).sample_points(3, 2)[index]


def test_each_sample_point_has_its_own_mask() -> None:
    masks = [np.array([value], np.int32) for value in (1, 2)]
    last = SamplePoint(SamplingParams(), np.zeros(5, np.int32), 0, frozenset(), masks[1])
    assert [point.allowed for point in SamplePoints(last, 2, masks)] == masks
