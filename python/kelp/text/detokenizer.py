"""Tokens to text, a few at a time, never splitting a character.

Two ways, by what the tokenizer's decoder is. Byte-level (GPT-2, Llama 3, Qwen, SmolLM): a token is a run of
bytes, so the text is an incremental UTF-8 decode. Anything else (SentencePiece, WordPiece): a token's text is what
it adds after its predecessor. Both look at each token once, whatever the length of the sequence. Special tokens
give no text. Knows nothing of stop words or responses.

Where the model emits bytes that are no UTF-8, each maximal broken run reads as U+FFFD, at once and for good; a
SentencePiece decoder that sees the whole sequence may also replace sound characters next to the broken one.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from typing import Protocol

from kelp.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHOR_PIECE = "<0x41>"
_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    """State of one sequence; not for several threads."""

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that the tokens complete; possibly none."""

    def flush(self) -> str:
        """At the end of the sequence: what an incomplete character leaves, as U+FFFD."""


def new_detokenizer(tokenizer: Tokenizer) -> Detokenizer:
    """The state for one sequence, of the kind that suits the tokenizer."""
    return _ByteLevelDetokenizer(tokenizer) if tokenizer.is_byte_level else _NeighbourDetokenizer(tokenizer)


class _ByteLevelDetokenizer:
    """Exact: the concatenation of all deltas is what decoding the whole sequence gives."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = _new_utf8_decoder("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        return self._utf8.decode(self._tokenizer.text_bytes(token_ids))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _NeighbourDetokenizer:
    """A token's text is `decode([previous, token])` without `decode([previous])`.

    The predecessor matters because decoders treat the first token differently (no leading space). Byte-fallback
    tokens beyond ASCII are collected until they make a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = _new_utf8_decoder("replace")
        self._previous: list[int] = []

    def push(self, token_ids: Iterable[int]) -> str:
        return "".join(self._text_of(token_id) for token_id in token_ids)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _text_of(self, token_id: int) -> str:
        piece = self._tokenizer.piece(token_id)
        if piece is None:
            return ""
        byte = self._fallback_byte(piece)
        if byte is not None and byte >= 0x80:
            if not self._previous:
                anchor = self._tokenizer.token_id(_ANCHOR_PIECE)
                self._previous = [] if anchor is None else [anchor]
            return self._utf8.decode(bytes([byte]))
        broken = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        before = self._tokenizer.decode(self._previous) if self._previous else ""
        text = self._tokenizer.decode([*self._previous, token_id])
        self._previous = [token_id]
        return broken + text[len(before) :]

    def _fallback_byte(self, piece: str) -> int | None:
        found = _BYTE_TOKEN.fullmatch(piece) if self._tokenizer.has_byte_fallback else None
        return int(found.group(1), 16) if found else None
