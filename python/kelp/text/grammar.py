"""Guides compiled against a model's vocabulary: which tokens keep the output on the way to what a guide demands.

The only importer of llguidance (docs/decisions/0006). Used twice: `preprocess` compiles to refuse a bad guide before
any work, the executor to follow it. Knows neither requests nor sampling.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt

from kelp.core.errors import InvalidRequest, NotSupported
from kelp.core.guide_spec import GuideSpec

GUIDE_FIELD = "guided_decoding_guide (or structured_outputs)"
_MAX_CACHED = 64
_MAX_LEXER_STATES = 50_000
"""Per grammar, about 2 KB each; llguidance's own limits on fuel bound the time of compiling and of each mask."""
_MAX_REASON_CHARS = 300
_WORD_BITS = 32
_ANY_OBJECT = '{"type":"object"}'
_WHITE_SPACE = r"(\r?\n[ \t]{0,32}|[ \t]{1,32})"
"""Between JSON tokens: what a formatter writes, but never so much that a small model gets lost in it."""


class Grammar:
    """One output on its way through a compiled guide. Not thread-safe.

    Attributes:
        num_words: Length of a mask: 32 tokens to a word.
    """

    def __init__(self, matcher: Any, num_words: int) -> None:
        self._matcher = matcher
        self.num_words = num_words

    @property
    def is_complete(self) -> bool:
        """Whether the output matches and nothing may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str:
        """Why no further mask can be computed, for example a grammar too ambiguous; empty as long as one can."""
        return _one_line(self._matcher.get_error()) if self._matcher.is_error() else ""

    def fill_mask(self, mask: npt.NDArray[np.int32]) -> None:
        """Set bit *i* of word *w* where token `32 * w + i` may come next, an end token where the output matches.

        Args:
            mask: `[num_words] int32`, contiguous, overwritten.
        """
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)

    def advance(self, token_id: int) -> bool:
        """Go on with this token; False, and no change, if the guide forbids it."""
        return bool(self._matcher.try_consume_tokens([token_id]) == 1)

    def rewind(self, num_tokens: int) -> None:
        """Take the last tokens back."""
        self._matcher.rollback(num_tokens)


class GrammarCompiler:
    """Compiles guides for one model and keeps the latest. Thread-safe.

    The vocabulary is read with the first guide: it takes some 60 MB and a fraction of a second.
    """

    def __init__(self, model_folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Args: `vocab_size` is the model's; ids that its tokenizer does not know are never allowed.

        A tokenizer may know more ids than the model: masks have bits for those too.
        """
        self._path = model_folder / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[GuideSpec, Any] = OrderedDict()

    @property
    def num_cached(self) -> int:
        """Guides that need not be compiled again."""
        return len(self._compiled)

    def compile(self, guide: GuideSpec) -> Grammar:
        """A fresh grammar for one output.

        Raises:
            InvalidRequest: The guide is malformed, can never be fulfilled, or is too complex.
            NotSupported: Guides do not go with this model's tokenizer.
        """
        with self._lock:
            matcher = self._compiled.get(guide)
            if matcher is None:
                matcher = self._compile(guide)
                self._compiled[guide] = matcher
            self._compiled.move_to_end(guide)
            while len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
            return Grammar(matcher.deep_copy(), self._num_words)

    @property
    def _num_words(self) -> int:
        num_bits: int = self._vocabulary.vocab_size
        return -(-num_bits // _WORD_BITS)

    def _compile(self, guide: GuideSpec) -> Any:
        if self._vocabulary is None:
            self._vocabulary = self._read_vocabulary()
        limits = llguidance.LLParserLimits(verbose_errors=False, max_lexer_states=_MAX_LEXER_STATES)
        try:
            matcher = llguidance.LLMatcher(self._vocabulary, _source(guide), log_level=0, limits=limits)
        except ValueError as error:
            raise _refusal(guide, str(error)) from None
        grammar = Grammar(matcher, self._num_words)
        if not grammar.error:
            # The first mask finds what compiling leaves alone: explosions, and languages without a single text.
            grammar.fill_mask(np.empty(self._num_words, np.int32))
        if grammar.error:
            raise _refusal(guide, matcher.get_error())
        return matcher

    def _read_vocabulary(self) -> Any:
        try:
            text = self._path.read_text(encoding="utf-8")
            try:
                return llguidance.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids or None)
            except ValueError:
                # It does not tell a tokenizer with more ids than the model from a broken one: that fails again.
                return llguidance.LLTokenizer(text, eos_token=self._eos_token_ids or None)
        except (OSError, ValueError) as error:
            reason = _one_line(str(error))
            raise NotSupported(f"{GUIDE_FIELD}: this model's tokenizer allows no guides: {reason}") from None


def _source(guide: GuideSpec) -> str:
    if guide.kind in ("json", "json_schema"):
        spaces: Any = {"whitespace_flexible": False} if guide.is_compact else {"whitespace_pattern": _WHITE_SPACE}
        return str(llguidance.LLMatcher.grammar_from_json_schema(guide.text or _ANY_OBJECT, defaults=spaces))
    if guide.kind == "choice":
        return str(llguidance.grammar_from("choice", json.dumps(guide.choices)))
    return str(llguidance.grammar_from("regex" if guide.kind == "regex" else "grammar", guide.text))


def _refusal(guide: GuideSpec, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{GUIDE_FIELD}: {guide.kind}: {_one_line(reason)}")


def _one_line(text: str) -> str:
    """What the library's report comes down to: the line that says `error:`, else the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return reason[:_MAX_REASON_CHARS]
