"""Clients that check what they get."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

import numpy as np

from kelp.chaos.load import Answered, Load
from kelp.chaos.questions import Question
from kelp.chaos.verdict import Expectation, Outcome
from kelp.client.grpc.llm import FieldValue, LlmError, LlmResponse

RIGHT = (11, 12, 13)
QUESTION = Question("hello", max_tokens=3, deadline_s=20.0)
BROKEN = LlmError("UNAVAILABLE", "connection reset", is_connection=True)


class Fixed:
    def answer(self, question: Question) -> tuple[tuple[int, ...], ...]:
        return (RIGHT,)


class Scripted:
    """Each call says its tokens one by one, then ends as its script does; None never ends."""

    def __init__(self, *calls: tuple[tuple[int, ...], LlmError | str]) -> None:
        self._calls = list(calls)
        self.fields: list[Mapping[str, FieldValue]] = []
        self.num_closed = 0

    async def stream(self, fields: Mapping[str, FieldValue], request_id: str = "") -> AsyncIterator[LlmResponse]:
        self.fields.append(fields)
        tokens, end = self._calls.pop(0)
        try:
            for token in tokens:
                yield LlmResponse({"output_ids": np.array([token], "<i4").tobytes()}, is_last=False)
            if isinstance(end, LlmError):
                raise end
            if end == "never":
                await asyncio.Event().wait()
            yield LlmResponse({}, is_last=True)
        finally:
            self.num_closed += 1


def ask(client: Scripted, question: Question = QUESTION, slack_s: float = 20.0) -> tuple[Load, Answered]:
    load = Load(client, Fixed(), slack_s)
    return load, asyncio.run(load.ask(question))


def test_a_right_answer_is_complete() -> None:
    load, answered = ask(Scripted((RIGHT, "end")))
    assert answered.judgement.outcome is Outcome.COMPLETED
    assert len(answered.token_times_s) == 3
    assert load.troubles == []


def test_a_wrong_token_is_seen_and_kept_for_the_report() -> None:
    load, answered = ask(Scripted(((11, 99, 13), "end")))
    assert (answered.judgement.outcome, load.tally.num_wrong_tokens) == (Outcome.WRONG, 1)
    assert load.troubles == [answered]


def test_a_broken_connection_is_asked_again_and_the_first_part_is_checked_too() -> None:
    client = Scripted(((11,), BROKEN), (RIGHT, "end"))
    load, answered = ask(client)
    assert answered.judgement.outcome is Outcome.COMPLETED
    assert load.tally.num_asked_again == 1
    assert int(str(client.fields[1]["deadline_ms"])) < int(str(client.fields[0]["deadline_ms"]))
    _, wrong = ask(Scripted(((12,), BROKEN), (RIGHT, "end")))
    assert wrong.judgement.outcome is Outcome.WRONG


def test_an_error_of_the_server_is_not_asked_again() -> None:
    _, answered = ask(Scripted(((11,), LlmError("WORKER_LOST", "gone"))))
    assert (answered.judgement.outcome, answered.judgement.code) == (Outcome.FAILED, "WORKER_LOST")


def test_a_request_that_does_not_end_hangs_and_is_let_go() -> None:
    client = Scripted(((11,), "never"))
    load, answered = ask(client, replace(QUESTION, deadline_s=0.01), slack_s=0.01)
    assert answered.judgement.outcome is Outcome.HUNG
    assert client.num_closed == 1
    assert load.troubles == [answered]


def test_clients_leave_after_their_tokens_or_their_time() -> None:
    by_tokens = replace(QUESTION, expectation=Expectation.LEAVES, leaves_after_tokens=2)
    by_time = replace(QUESTION, expectation=Expectation.LEAVES, leaves_after_s=0.01)
    for question in (by_tokens, by_time):
        client = Scripted((RIGHT[:2], "never"))
        _, answered = ask(client, question)
        assert answered.judgement.outcome is Outcome.LEFT
        assert client.num_closed == 1
