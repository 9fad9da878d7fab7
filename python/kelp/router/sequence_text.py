"""One sequence's tokens on their way to being a response: detokenised, and cut at a stop word.

Knows neither responses nor other sequences; `relay` has one of these for each sequence of a request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from kelp.core.types import FinishReason


class Detokenizer(Protocol):
    """What the relay needs of `text.detokenizer`."""

    def push(self, token_ids: list[int]) -> str:
        """Text that these tokens complete."""

    def flush(self) -> str:
        """Text still held back at the end."""


class StopMatcher(Protocol):
    """What the relay needs of `text.stop_words`."""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that can go out, and whether a stop word was hit."""

    def flush(self) -> str:
        """Text held back because it might have begun a stop word."""


@dataclass(slots=True)
class Delta:
    """What a sequence has gained since its last response."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class SequenceText:
    """One sequence, between worker and client.

    Args:
        hidden_token_ids: Ids that end a sequence; they count as output but are no text.
        prefix: Text to put first (the prompt, when the client asked for it).

    Attributes:
        num_tokens: Output tokens so far; those after a stop word are dropped.
        finish_reason: None while the sequence runs.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop_words: StopMatcher, hidden_token_ids: frozenset[int], prefix: str = ""
    ) -> None:
        self._detokenizer = detokenizer
        self._stop_words = stop_words
        self._hidden_token_ids = hidden_token_ids
        self._pending = Delta(text=[prefix] if prefix else [])
        self.num_tokens = 0
        self.has_hit_stop_word = False
        self.finish_reason: FinishReason | None = None

    @property
    def has_tokens(self) -> bool:
        """Whether there are tokens that no response has carried yet."""
        return bool(self._pending.token_ids)

    def take(self, token_ids: tuple[int, ...], log_probs: tuple[float, ...]) -> None:
        """Add tokens."""
        if self.has_hit_stop_word:
            return
        self.num_tokens += len(token_ids)
        self._pending.token_ids.extend(token_ids)
        self._pending.log_probs.extend(log_probs)
        self._take_text(self._detokenizer.push([token for token in token_ids if token not in self._hidden_token_ids]))

    def end(self, reason: FinishReason) -> None:
        """No token follows: what was held back is text now, or completes a stop word."""
        if not self.has_hit_stop_word:
            self._take_text(self._detokenizer.flush())
        if not self.has_hit_stop_word:
            self._pending.text.append(self._stop_words.flush())
        self.finish_reason = FinishReason.STOP if self.has_hit_stop_word else reason

    def drain(self) -> Delta:
        """What is new, once."""
        pending, self._pending = self._pending, Delta()
        return pending

    def _take_text(self, text: str) -> None:
        passed, self.has_hit_stop_word = self._stop_words.push(text)
        self._pending.text.append(passed)
