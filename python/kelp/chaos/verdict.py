"""What became of a request: judged by its tokens, its error and the time it took. Knows no client and no server."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_SHED_CODE = "OVERLOADED"
_DEADLINE_CODE = "DEADLINE_EXCEEDED"


class Expectation(str, enum.Enum):
    """What must become of a request, faults or not."""

    ANSWER = "answer"
    """All of its tokens; it may be shed."""
    LEAVES = "leaves"
    """Its client goes; what has come until then is right."""
    DEADLINE = "deadline"
    """Its deadline is too short; it ends by then, answered or not, also where no server has been up to hear of it."""
    REFUSAL = "refusal"
    """A typed error that blames the request."""


class Outcome(str, enum.Enum):
    """What became of it."""

    COMPLETED = "completed"
    SHED = "shed"
    LEFT = "left"
    EXPIRED = "expired"
    REFUSED = "refused"
    FAILED = "failed"
    WRONG = "wrong"
    HUNG = "hung"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client saw of one request.

    Attributes:
        tokens: By sequence.
        code: Of the error that ended it; empty for none.
        text: Of the error.
        is_hung: It had not ended some seconds after its deadline.
        num_asked: Calls that it took: a client asks again when the connection breaks.
        is_unreached: The last of them reached nobody.
        has_begun: One of them has brought a token: what has begun is not shed any more, it fails.
    """

    tokens: Mapping[int, Sequence[int]]
    code: str = ""
    text: str = ""
    is_hung: bool = False
    num_asked: int = 1
    is_unreached: bool = False
    has_begun: bool = False


@dataclass(frozen=True, slots=True)
class Judgement:
    """See `judge`."""

    outcome: Outcome
    code: str = ""
    text: str = ""
    num_wrong_tokens: int = 0
    num_asked: int = 1


REFUSAL_CODES = frozenset({"INVALID_ARGUMENT", "PROMPT_TOO_LONG", "NOT_SUPPORTED", "NOT_FOUND"})
"""Codes that blame the request."""
_TRITONS_REFUSAL = "for input '"
"""Triton itself refuses a wrong shape or type, by the name of the input but without a code of ours."""


def num_wrong_tokens(expected: Sequence[int], seen: Sequence[int], is_whole: bool) -> int:
    """Tokens that differ from the reference or go beyond it; with `is_whole` also those that lack."""
    num_different = sum(1 for ours, theirs in zip(expected, seen, strict=False) if ours != theirs)
    num_surplus = max(0, len(seen) - len(expected))
    num_lacking = max(0, len(expected) - len(seen)) if is_whole else 0
    return num_different + num_surplus + num_lacking


def judge(expectation: Expectation, expected: Sequence[Sequence[int]], seen: Seen) -> Judgement:
    """Decide what became of a request.

    Args:
        expectation: What must become of it.
        expected: The reference's tokens of each sequence, whole.
        seen: What its client saw.
    """
    is_whole = not seen.code and not seen.is_hung and expectation in (Expectation.ANSWER, Expectation.DEADLINE)
    num_wrong = sum(
        num_wrong_tokens(tokens, seen.tokens.get(index, ()), is_whole) for index, tokens in enumerate(expected)
    ) + sum(len(tokens) for index, tokens in seen.tokens.items() if index >= len(expected))
    outcome = _outcome(expectation, seen)
    text = seen.text
    if num_wrong and outcome is not Outcome.HUNG:
        outcome, text = Outcome.WRONG, f"{num_wrong} tokens differ from the reference; {seen.text}".rstrip("; ")
    return Judgement(outcome, seen.code, text, num_wrong, seen.num_asked)


def _outcome(expectation: Expectation, seen: Seen) -> Outcome:
    if seen.is_hung:
        return Outcome.HUNG
    if expectation is Expectation.REFUSAL:
        return Outcome.REFUSED if seen.code in REFUSAL_CODES or _TRITONS_REFUSAL in seen.text else Outcome.FAILED
    if seen.code == _SHED_CODE and not seen.has_begun:
        return Outcome.SHED
    if expectation is Expectation.DEADLINE and (seen.code == _DEADLINE_CODE or seen.is_unreached):
        return Outcome.EXPIRED
    if seen.code:
        return Outcome.FAILED
    return Outcome.LEFT if expectation is Expectation.LEAVES else Outcome.COMPLETED


@dataclass
class Tally:
    """Counts of judgements."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    failed_by_code: Counter[str] = field(default_factory=Counter)
    num_wrong_tokens: int = 0
    num_asked_again: int = 0

    def add(self, judgement: Judgement) -> None:
        """Count one more."""
        self.outcomes[judgement.outcome] += 1
        if judgement.outcome is Outcome.FAILED:
            self.failed_by_code[judgement.code or "none"] += 1
        self.num_wrong_tokens += judgement.num_wrong_tokens
        self.num_asked_again += judgement.num_asked > 1

    @property
    def num_requests(self) -> int:
        """All of them."""
        return sum(self.outcomes.values())

    @property
    def completed_share(self) -> float:
        """`num_completed` of `num_to_complete`; 1 of none."""
        return self.num_completed / self.num_to_complete if self.num_to_complete else 1.0

    @property
    def num_completed(self) -> int:
        """Answered whole."""
        return self.outcomes[Outcome.COMPLETED]

    @property
    def num_to_complete(self) -> int:
        """Requests that were neither shed nor meant to end otherwise."""
        return sum(self.outcomes[outcome] for outcome in _COUNTED)


_COUNTED = (Outcome.COMPLETED, Outcome.FAILED, Outcome.WRONG, Outcome.HUNG)
