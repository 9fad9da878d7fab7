"""The `Guide` of one sequence, over a compiled grammar."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kelp.core.errors import InvalidRequest, NotSupported
from kelp.executor.base import ExecutorRequest
from kelp.text.grammar import GUIDE_FIELD, Grammar, GrammarCompiler


class GrammarGuide:
    """See `guide.Guide`. Masks live in one buffer, which grows to the longest draft seen."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._masks = np.empty((1, grammar.num_words), np.int32)
        self._refusal = ""

    @property
    def is_finished(self) -> bool:
        """See `Guide`."""
        return self._grammar.is_complete

    @property
    def error(self) -> str:
        """See `Guide`."""
        return self._refusal or self._grammar.error

    def allowed(self, draft: Sequence[int]) -> list[npt.NDArray[np.int32]]:
        """See `Guide`; the masks are overwritten by the next call."""
        if len(self._masks) <= len(draft):
            self._masks = np.empty((len(draft) + 1, self._grammar.num_words), np.int32)
        self._grammar.fill_mask(self._masks[0])
        num_masks, num_explored = 1, 0
        for token_id in draft:
            if not self._grammar.advance(token_id):
                break
            num_explored += 1
            if self._grammar.is_complete:
                break
            self._grammar.fill_mask(self._masks[num_masks])
            num_masks += 1
        if num_explored:
            self._grammar.rewind(num_explored)
        return list(self._masks[:num_masks])

    def accept(self, token_id: int) -> None:
        """See `Guide`."""
        if not self.error and not self._grammar.advance(token_id):
            self._refusal = f"token {token_id} does not continue the output"


def start_guide(compiler: GrammarCompiler | None, request: ExecutorRequest) -> GrammarGuide | None:
    """The guide of a request, with its earlier output accepted; None for a free one.

    Raises:
        InvalidRequest: The guide is bad, or forbids the earlier output.
        NotSupported: This executor follows no guides.
    """
    spec = request.sampling.guide
    if spec is None:
        return None
    if compiler is None:
        raise NotSupported(f"{GUIDE_FIELD}: this executor follows no guides")
    guide = GrammarGuide(compiler.compile(spec))
    for token_id in request.prompt[request.num_original_tokens :].tolist():
        guide.accept(token_id)
    if guide.error:
        raise InvalidRequest(f"num_generated: the guide forbids the {request.num_generated} tokens: {guide.error}")
    return guide
