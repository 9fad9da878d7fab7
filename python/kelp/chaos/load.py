"""Clients that ask, check every token that comes, and never wait for ever."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kelp.chaos.questions import Question, Questions, Reference
from kelp.chaos.verdict import Judgement, Outcome, Seen, Tally, judge, num_wrong_tokens
from kelp.client.grpc.llm import FieldValue, LlmError, LlmResponse

_AGAIN_S = 0.25
_SHED_PAUSE_S = 1.0
_MAX_KEPT = 100


class LlmStreams(Protocol):
    """The part of `client.grpc.LlmClient` that is needed here."""

    def stream(self, fields: Mapping[str, FieldValue], request_id: str = "") -> AsyncIterator[LlmResponse]:
        """See `LlmClient`."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that has ended.

    Attributes:
        started_s: `time.monotonic()`.
        token_times_s: When each response with tokens came; of the last call that it took.
        worker_ids: Workers that answered, if it was answered.
    """

    request_id: str
    question: Question
    judgement: Judgement
    started_s: float
    ended_s: float
    token_times_s: tuple[float, ...] = ()
    worker_ids: tuple[str, ...] = ()


@dataclass
class _Call:
    """What has come on one call."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    times_s: list[float] = field(default_factory=list)
    worker_ids: list[str] = field(default_factory=list)
    error: LlmError | None = None

    def take(self, response: LlmResponse) -> None:
        if ids := response.token_ids:
            self.tokens.setdefault(response.sequence_index, []).extend(ids)
            self.times_s.append(time.monotonic())
        self.worker_ids = response.worker_ids or self.worker_ids

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for tokens in self.tokens.values())


class Load:
    """Asks and keeps count.

    Args:
        slack_s: A request that has not ended so long after its deadline hangs.
        on_answered: Told of every request that has ended.
    """

    def __init__(
        self,
        client: LlmStreams,
        reference: Reference,
        slack_s: float,
        on_answered: Callable[[Answered], None] = lambda _: None,
    ) -> None:
        self.tally = Tally()
        self.troubles: list[Answered] = []
        self._client = client
        self._reference = reference
        self._slack_s = slack_s
        self._on_answered = on_answered
        self._num_asked = 0

    async def run_users(self, questions: Questions, num_users: int, is_over: Callable[[], bool]) -> None:
        """So many users, each asking again once answered, or a second after a refusal that says to come again later.

        Args:
            questions: Where they come from.
            num_users: How many there are.
            is_over: Whether nobody asks any more.
        """

        async def user() -> None:
            while not is_over():
                answered = await self.ask(questions.next())
                if answered.judgement.outcome is Outcome.SHED:
                    await asyncio.sleep(_SHED_PAUSE_S)

        await asyncio.gather(*(user() for _ in range(num_users)))

    async def ask_all(self, questions: list[Question]) -> list[Answered]:
        """All at once."""
        return list(await asyncio.gather(*(self.ask(question) for question in questions)))

    async def ask(self, question: Question) -> Answered:
        """One request to its end, or until it hangs."""
        self._num_asked += 1
        request_id, started_s, calls = f"chaos-{self._num_asked}", time.monotonic(), [_Call()]
        is_hung = False
        try:
            await asyncio.wait_for(self._converse(question, request_id, calls), question.deadline_s + self._slack_s)
        except asyncio.TimeoutError:
            is_hung = True
        last = calls[-1]
        judgement = self._judge(question, calls, is_hung)
        answered = Answered(
            request_id, question, judgement, started_s, time.monotonic(), tuple(last.times_s), tuple(last.worker_ids)
        )
        self._note(answered)
        return answered

    async def _converse(self, question: Question, request_id: str, calls: list[_Call]) -> None:
        started_s = time.monotonic()
        while True:
            left_s = question.deadline_s - (time.monotonic() - started_s)
            await self._call(question, request_id, left_s, calls[-1])
            error, left_s = calls[-1].error, question.deadline_s - (time.monotonic() - started_s)
            if error is None or not error.is_connection or left_s < _AGAIN_S:
                return
            await asyncio.sleep(_AGAIN_S)
            calls.append(_Call())

    async def _call(self, question: Question, request_id: str, left_s: float, call: _Call) -> None:
        reading = self._read(question, request_id, left_s, call)
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reading, question.leaves_after_s)
        except LlmError as error:
            call.error = error

    async def _read(self, question: Question, request_id: str, left_s: float, call: _Call) -> None:
        stream = self._client.stream(question.fields(left_s), request_id)
        async with contextlib.aclosing(stream) as responses:  # type: ignore[type-var]
            async for response in responses:
                call.take(response)
                if question.leaves_after_tokens is not None and call.num_tokens >= question.leaves_after_tokens:
                    return

    def _judge(self, question: Question, calls: list[_Call], is_hung: bool) -> Judgement:
        last, expected = calls[-1], () if question.refused else self._reference.answer(question)
        error = last.error
        seen = Seen(
            tokens=last.tokens,
            code=error.code if error else "",
            text=error.text if error else "",
            is_hung=is_hung,
            num_asked=len(calls),
            is_unreached=error is not None and error.is_connection,
            has_begun=any(call.num_tokens for call in calls),
        )
        judgement = judge(question.expectation, expected, seen)
        before = sum(
            num_wrong_tokens(tokens, call.tokens.get(index, ()), is_whole=False)
            for call in calls[:-1]
            for index, tokens in enumerate(expected)
        )
        if not before:
            return judgement
        return Judgement(
            Outcome.WRONG, judgement.code, f"{before} wrong tokens before the connection broke",
            judgement.num_wrong_tokens + before, judgement.num_asked,
        )  # fmt: skip

    def _note(self, answered: Answered) -> None:
        self.tally.add(answered.judgement)
        is_trouble = answered.judgement.outcome in (Outcome.FAILED, Outcome.WRONG, Outcome.HUNG)
        if is_trouble and len(self.troubles) < _MAX_KEPT:
            self.troubles.append(answered)
        self._on_answered(answered)
