"""A lower bound for the number of tokens of a text, without tokenising it.

Tokenising megabytes takes seconds and gigabytes; a prompt that cannot possibly fit is refused before. The bound
needs a tokenizer that loses no byte of the text; for any other there is none. Reads tokenizer.json only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_KEEPS_EVERY_BYTE = {"ByteLevel", "Digits", "Split", "Sequence"}


def _pre_tokenizers(document: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if document:
        yield document
        for part in document.get("pretokenizers", ()):
            yield from _pre_tokenizers(part)


def longest_token_bytes(document: Mapping[str, Any]) -> int:
    """No token stands for more bytes of text than this; 0 where a token may stand for any number.

    Args:
        document: tokenizer.json. Normalisers, pre-tokenizers that drop separators, and added tokens that swallow the
            white space beside them all lose text.
    """
    steps = list(_pre_tokenizers(document.get("pre_tokenizer")))
    loses_text = (
        document.get("normalizer") is not None
        or any(step["type"] not in _KEEPS_EVERY_BYTE or step.get("behavior") == "Removed" for step in steps)
        or any(token["lstrip"] or token["rstrip"] for token in document["added_tokens"])
        or document["model"]["type"] != "BPE"
        or all(step["type"] != "ByteLevel" for step in steps)
    )
    if loses_text:
        return 0
    pieces = [*document["model"]["vocab"], *(token["content"] for token in document["added_tokens"])]
    return max((len(piece.encode()) for piece in pieces), default=0)
