"""What is asked, and what is right."""

from __future__ import annotations

import pytest

from kelp.chaos.faults import Phase
from kelp.chaos.questions import Questions, RecordedReference
from kelp.chaos.verdict import Expectation


def test_equal_seeds_ask_the_same_in_the_same_order() -> None:
    first, second, other = Questions(3, 20), Questions(3, 20), Questions(4, 20)
    asked = [first.next() for _ in range(50)]
    assert asked == [second.next() for _ in range(50)]
    assert asked != [other.next() for _ in range(50)]


def test_questions_have_some_caches_to_hit_and_some_to_miss() -> None:
    questions = Questions(3, 20)
    salts = [questions.next().salt for _ in range(100)]
    used = [salt for salt in salts if salt]
    assert 0 < len(set(used)) < len(used) < 100


def test_what_is_asked_again_was_asked_long_ago_and_is_long() -> None:
    questions = Questions(3, 20)
    assert questions.asked_before(4) == []
    asked = [question for question in (questions.next() for _ in range(200)) if question.salt]
    again = questions.asked_before(4)
    assert len(again) == 4
    assert set(again) <= set(asked[: len(asked) * 2 // 3])
    assert min(len(question.prompt) for question in again) >= max(len(question.prompt) for question in asked) / 2


@pytest.mark.parametrize("phase", list(Phase))
def test_a_leaving_client_knows_when(phase: Phase) -> None:
    question = Questions(3, 20).leaving(phase)
    assert question.expectation is Expectation.LEAVES
    assert (question.leaves_after_s is None) != (question.leaves_after_tokens is None)


def test_bad_input_is_sent_as_it_is() -> None:
    bad = Questions(3, 20).bad()
    assert len(bad) > 20
    assert {question.expectation for question in bad} == {Expectation.REFUSAL}
    assert all("ignore_eos" not in question.fields(1.0) for question in bad)


def test_a_recorded_answer_is_the_reference_whatever_the_salt() -> None:
    questions, recorded = Questions(3, 5), RecordedReference()
    for number, question in enumerate(questions.pool):
        recorded.record(question, [[number]] * question.num_sequences)
    salted = next(question for question in iter(questions.next, None) if question.salt)
    assert recorded.answer(salted)[0][0] in range(5)
