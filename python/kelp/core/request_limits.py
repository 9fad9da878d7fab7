"""Limits on what one request may carry, and how a refused value is shown.

Everything a client sends is bounded before it is decoded, and no error message repeats more than a glimpse of it.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

from kelp.core.config import RouterConfig
from kelp.core.errors import InvalidRequest

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What `core.request` accepts.

    Attributes:
        max_request_bytes: All tensors together, as they cross the wire.
        max_stop_words: Entries of `stop_words`, of `bad_words` and of `stop_token_ids`, each.
        max_word_bytes: One stop word or bad word, UTF-8.
        max_name_bytes: `cache_salt`, `session_id` and `lora_name`, UTF-8.
        max_return_sequences: `num_return_sequences`.
    """

    max_request_bytes: int = 8 * 1024 * 1024
    max_stop_words: int = 64
    max_word_bytes: int = 256
    max_name_bytes: int = 1024
    max_return_sequences: int = 16

    @classmethod
    def from_config(cls, config: RouterConfig) -> RequestLimits:
        """The configured limits; the others are fixed."""
        return cls(
            max_request_bytes=config.max_request_bytes,
            max_stop_words=config.max_stop_words,
            max_return_sequences=config.max_return_sequences,
        )


def short_repr(value: object) -> str:
    """`repr` cut to a length that suits an error message."""
    return _SHORT.repr(value)


def check_text_bytes(field: str, text: str, max_bytes: int) -> None:
    """Refuse text that is longer than `max_bytes` or that UTF-8 cannot express.

    Raises:
        InvalidRequest: Names the field, its length and the limit.
    """
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{field}: {short_repr(text)} holds a lone surrogate at character {error.start}") from None
    if num_bytes > max_bytes:
        raise InvalidRequest(f"{field}: {num_bytes} bytes exceed the limit of {max_bytes}")
