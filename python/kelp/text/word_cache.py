"""Tokenising what a prompt mostly is, words that have been seen before, without the tokenizer.

A byte-level BPE splits text into words by a regular expression and merges within each word alone, so a word always
gives the same tokens. Splitting and bookkeeping is most of what it takes; looking words up takes a fifth or less. Only
for text in ASCII, where Python's expressions mean the same as the tokenizer's, and for the splittings named here.

None of these joins what stands before a single space with what stands behind it, or looks past it, unless at more
space. So what stands between two is looked up as a whole, and most text need not be split into words at all.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from os.path import commonprefix
from typing import Any

import numpy as np
import numpy.typing as npt

_MAX_CHARS = 16_384
"""Longer text goes to the tokenizer, which lets other threads run meanwhile."""
_MAX_WORDS = 32_768
_MAX_WORD_CHARS = 64
_GPT2 = r" ?\p{L}+| ?\p{N}+|'(?:[stmd]|re|ve|ll)| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's own begins with the contractions; none of these can match where a word of letters or a number does."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_GPT2_BETWEEN_DIGITS = r" ?[A-Za-z]+|[0-9]|'(?:[stmd]|re|ve|ll)| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+"
_UNCHANGED_ASCII = ("NFC", "NFD", "NFKC", "NFKD")
_PROBE = (
    "def f(x1, y_22):\n\n    return  {'a': 'it's I'LL', \"b\": [1234567, 8.90]}  # we've \t\v end\r\n \r\n\x7f\x1f\x00"
    "   3 ?! ...   \n  the quick  brown-fox's 42nd   "
)


def _ascii(pattern: str) -> str:
    """The same expression for ASCII."""
    for name, chars in (("L", "A-Za-z"), ("N", "0-9")):
        inside = re.sub(r"\[[^\]]*\]", lambda found: found[0].replace(rf"\p{{{name}}}", chars), pattern)  # noqa: B023
        pattern = inside.replace(rf"\p{{{name}}}", f"[{chars}]")
    return pattern


def _splitting(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """The expression whose matches are the words of a text in ASCII; None if this one is not known."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"] or len(steps) > 2:
        return None
    first, has_own = (steps[0] if len(steps) == 2 else None), steps[-1].get("use_regex", True)
    if first is None:
        return _ascii(_GPT2) if has_own else None
    if first["type"] == "Digits":
        return _GPT2_BETWEEN_DIGITS if has_own and first["individual_digits"] else None
    if first["type"] != "Split" or has_own or first["behavior"] != "Isolated" or first["invert"]:
        return None
    pattern = first["pattern"].get("Regex")
    return _ascii(pattern) if pattern in (_LLAMA3, _QWEN2) else None


def _added_tokens(tokens: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """Ids of added tokens by what they look like; None if one of them is more than a piece of text."""
    in_ascii = [token for token in tokens if token["content"].isascii()]
    if any(token["single_word"] or token["lstrip"] or token["rstrip"] or token["normalized"] for token in in_ascii):
        return None
    return {token["content"]: token["id"] for token in in_ascii}


def _any_of(contents: Iterable[str]) -> str:
    """A group that matches the longest of them; what all begin with comes first, because `re` looks for that fast."""
    longest_first = sorted(contents, key=len, reverse=True)
    start = commonprefix(longest_first)
    rest = "|".join(re.escape(content[len(start) :]) for content in longest_first)
    return f"({re.escape(start)}(?:{rest}))"


class _SpaceMeets(Exception):
    """A single space is not the only one there."""


class _Known(dict[str, bytes]):
    """Token ids, `int32`, as bytes; what is missing is asked for."""

    def __init__(self, ask: Callable[[str], bytes]) -> None:
        super().__init__()
        self._ask = ask

    def __missing__(self, text: str) -> bytes:
        ids = self._ask(text)
        if len(text) <= _MAX_WORD_CHARS:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[text] = ids
        return ids


class WordCache:
    """May be used from several threads.

    Args:
        pattern: Its matches are words; all text is in one.
        added: Ids of tokens that are looked for before there are words.
        merge: Token ids of one word.
    """

    def __init__(self, pattern: str, added: Mapping[str, int], merge: Callable[[str], list[int]]) -> None:
        self._split = re.compile(pattern, re.ASCII).findall
        self._words = _Known(lambda word: np.array(merge(word), np.int32).tobytes())
        self._behind_space = _Known(self._ids_behind_space)
        self._added = {content: np.array([token_id], np.int32).tobytes() for content, token_id in added.items()}
        self._find_added = re.compile(_any_of(added)) if added else None

    def encode(self, text: str) -> npt.NDArray[np.int32] | None:
        """Token ids `[num_tokens] int32` without any that a template would add; None: ask the tokenizer."""
        if len(text) > _MAX_CHARS or not text.isascii():
            return None
        parts = [text] if self._find_added is None else self._find_added.split(text)
        pieces = ((self._added[part],) if index % 2 else self._ids_of(part) for index, part in enumerate(parts))
        return np.frombuffer(b"".join(chain.from_iterable(pieces)), np.int32).copy()

    def _ids_of(self, text: str) -> Iterable[bytes]:
        if "  " not in text:
            first, *others = text.split(" ")
            if not first[-1:].isspace():
                with contextlib.suppress(_SpaceMeets):
                    return [*self._ids_by_word(first), *map(self._behind_space.__getitem__, others)]
        return self._ids_by_word(text)

    def _ids_behind_space(self, text: str) -> bytes:
        if not text or text[0].isspace() or text[-1].isspace():
            raise _SpaceMeets
        return b"".join(self._ids_by_word(f" {text}"))

    def _ids_by_word(self, text: str) -> Iterable[bytes]:
        return map(self._words.__getitem__, self._split(text))


def new_word_cache(
    document: Mapping[str, Any], merge: Callable[[str], list[int]], encode: Callable[[str], list[int]]
) -> WordCache | None:
    """A cache for the tokenizer of this tokenizer.json; None if there is none that would do the same.

    Args:
        document: tokenizer.json.
        merge: The tokenizer's ids of one word, given in its own alphabet.
        encode: Its ids of a text, to compare with.
    """
    model, normalizer = document["model"], document.get("normalizer")
    pattern, added = _splitting(document.get("pre_tokenizer")), _added_tokens(document["added_tokens"])
    is_known = model["type"] == "BPE" and not any(
        model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    if not is_known or pattern is None or added is None:
        return None
    if normalizer is not None and normalizer["type"] not in _UNCHANGED_ASCII:
        return None
    cache = WordCache(pattern, added, merge)
    probe = "".join([_PROBE, *(content + " a" for content in added)])[:_MAX_CHARS]
    for text in (probe, " ".join(probe.split())):
        found = cache.encode(text)
        if found is None or found.tolist() != encode(text):
            return None
    return cache
