"""A proposer that knows what the mock will say, so that a step yields several tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from kelp.core.messages import SamplingParams
from kelp.executor.batching.drafts import DraftContext, Tokens
from kelp.executor.mock.language import EMPTY, Vocabulary, last_state

_MAX_REMEMBERED = 4096


class Foresight:
    """See `batching.drafts.DraftProposer`. Right about greedy requests; of others it guesses the greedy answer.

    Remembers the state of each sequence, so that a proposal costs the tokens since the last one.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._greedy = SamplingParams()
        self._states: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def propose(self, contexts: Sequence[DraftContext]) -> list[Tokens]:
        """See `DraftProposer`."""
        return [self._guess(context) for context in contexts]

    def _guess(self, context: DraftContext) -> Tokens:
        num_known, state = self._states.pop(context.request_id, (0, EMPTY))
        if num_known > len(context.tokens):
            num_known, state = 0, EMPTY
        state = last_state(state, context.tokens[num_known:], num_known)
        self._states[context.request_id] = len(context.tokens), state
        if len(self._states) > _MAX_REMEMBERED:
            self._states.popitem(last=False)
        guess = self._vocabulary.continue_from(state, len(context.tokens), context.max_tokens, self._greedy)
        return np.array(guess, np.int32)
