"""Where draft tokens come from, and how well those of one sequence have done.

A draft is a guess at what a sequence says next; a step verifies several at once for little more than the price of
one token. A wrong guess costs its row and nothing else, so proposers may guess freely. Knows tokens, not engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
"""`[num_tokens] int32`."""

_LONGEST_MATCH = 4
_FORGETTING = 0.25
"""Weight of the newest draft in an acceptance rate."""


@dataclass(frozen=True, slots=True)
class DraftContext:
    """A sequence that could use drafts.

    Attributes:
        request_id: Names the sequence as long as it lives; a draft model would keep its own KV under it.
        tokens: Prompt and output so far; a view, valid during the call only.
        max_tokens: Most drafts of use, at least 1.
    """

    request_id: str
    tokens: Tokens
    max_tokens: int


class DraftProposer(Protocol):
    """Guesses what sequences say next. Called from the engine's thread, before each step that has room for drafts."""

    def propose(self, contexts: Sequence[DraftContext]) -> list[Tokens]:
        """Drafts of all sequences in one call, because a draft model wants a batch.

        Returns:
            One array per context, in order: at most `max_tokens` ids of the vocabulary, possibly none.
        """


class NgramProposer:
    """Guesses that a sequence goes on as it did where its last few tokens occurred before. Keeps no state.

    The longest match of 2 to 4 tokens wins, of equally long ones the most recent. A match that overlaps the end
    is a loop, and the draft goes round it.

    Source: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding.
    """

    def propose(self, contexts: Sequence[DraftContext]) -> list[Tokens]:
        """See `DraftProposer`; takes about 10 us per sequence and 10k tokens."""
        return [self._continuation(context.tokens, context.max_tokens) for context in contexts]

    def _continuation(self, tokens: Tokens, max_tokens: int) -> Tokens:
        num_tokens = len(tokens)
        # Where the last token occurred before, narrowed down by one more token in front of it at a time.
        ends = np.flatnonzero(tokens[:-1] == tokens[-1])
        best = ends[:0]
        for distance in range(1, min(_LONGEST_MATCH, num_tokens)):
            ends = ends[ends >= distance]
            ends = ends[tokens[ends - distance] == tokens[num_tokens - 1 - distance]]
            if not len(ends):
                break
            best = ends
        if not len(best):
            return tokens[:0]
        first = int(best[-1]) + 1
        draft: Tokens = tokens[first + np.arange(max_tokens) % (num_tokens - first)]
        return draft


@dataclass(slots=True)
class Acceptance:
    """How well the drafts of one sequence have done lately.

    Attributes:
        rate: Estimated probability that a draft is right if the one before it is, between 0 and 1.
    """

    rate: float = 0.5

    def observe(self, num_right: int, num_wrong: int) -> None:
        """Learn from the drafts that a step verified, the wrong one last."""
        for _ in range(num_right):
            self.rate += _FORGETTING * (1.0 - self.rate)
        for _ in range(num_wrong):
            self.rate -= _FORGETTING * self.rate
