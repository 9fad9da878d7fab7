"""How many drafts a sequence gets, so that speculation pays or stays out of the way.

A step that reads the weights once costs `1 + row_cost * num_rows` in units of an empty one. One more row pays if its
chance to yield a token exceeds what a token costs at present: with `n` decodes, `row_cost * n / (1 + row_cost * n)`.
The chance of the *i*-th draft is the sequence's acceptance rate to the power *i*. So a lone sequence drafts at the
faintest hope, a large batch only where drafts are nearly always right, and a sequence whose drafts fail stops.

A sequence without drafts keeps its rate current at no row: now and then the proposer's guess is compared with
the token that came anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass

from kelp.executor.batching.drafts import DraftContext, DraftProposer
from kelp.executor.batching.sequence import Sequence

_WATCH_PERIOD_TOKENS = 8
_RATE_LIMITS = (0.01, 0.99)


@dataclass(frozen=True, slots=True)
class SpeculationRules:
    """Whether and how eagerly an engine speculates.

    Attributes:
        num_draft_tokens: Most drafts of one sequence in one step; 0 turns speculation off.
        row_cost: What one more row adds to a step's time, relative to a step without rows.
    """

    num_draft_tokens: int = 0
    row_cost: float = 1 / 16


class Speculation:
    """Drafts for the sequences of one engine."""

    def __init__(self, rules: SpeculationRules, proposer: DraftProposer) -> None:
        self._rules = rules
        self._proposer = proposer
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    @property
    def may_draft(self) -> bool:
        """Whether any sequence may get drafts at all."""
        return self._rules.num_draft_tokens > 0

    def num_worthwhile(self, sequence: Sequence, num_decodes: int) -> int:
        """Drafts of a sequence that pay in a step of `num_decodes` decoding sequences, whatever they turn out to be."""
        if not self._rules.num_draft_tokens:
            return 0
        time = self._rules.row_cost * num_decodes
        low, high = _RATE_LIMITS
        rate = min(max(sequence.acceptance.rate, low), high)
        num_paying = int(math.log(time / (1 + time)) / math.log(rate))
        return min(num_paying, self._rules.num_draft_tokens, sequence.num_draftable)

    def draft(self, sequences: Many[Sequence], limits: Many[int]) -> list[int]:
        """Put up to `limits[i]` drafts behind the tokens of `sequences[i]`; returns how many each got."""
        contexts = [
            DraftContext(sequence.request.request_id, sequence.history.known, limit)
            for sequence, limit in zip(sequences, limits, strict=True)
        ]
        proposals = self._proposer.propose(contexts)
        for sequence, proposal in zip(sequences, proposals, strict=True):
            sequence.history.put_drafts(proposal)
        return [len(proposal) for proposal in proposals]

    def verified(self, sequence: Sequence, num_drafts: int, num_right: int) -> None:
        """A step verified drafts, and the first `num_right` of them made it more than one token."""
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_right
        sequence.acceptance.observe(num_right, int(num_right < num_drafts))

    def watch(self, sequence: Sequence, token_id: int) -> None:
        """A sequence is about to go on with a token that no draft foretold."""
        if not self._rules.num_draft_tokens or sequence.num_tokens % _WATCH_PERIOD_TOKENS:
            return
        (guess,) = self._proposer.propose([DraftContext(sequence.request.request_id, sequence.history.known, 1)])
        if len(guess):
            is_right = int(guess[0]) == token_id
            sequence.acceptance.observe(int(is_right), int(not is_right))
