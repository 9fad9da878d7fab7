"""From worker tokens to client responses: detokenise, apply stop words, coalesce, send.

Runs in the sending thread (`core.outbox`), so a busy relay makes responses larger instead of slower. A worker speaks
tokens only; a change of worker is invisible here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kelp.core.exchange import Exchange, Tensors
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


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens to relay, with their log-probs."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class End:
    """The last response's content: why it ended and the summary tensors."""

    finish_reason: FinishReason
    summary: Callable[[int], Tensors]


RelayItem = NewTokens | End


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """How the client wants its answer.

    Attributes:
        is_streaming: Deltas as they come, or one response at the end.
        hidden_token_ids: Ids that end a sequence; they count as output but are no text.
        prefix: Text to put first (the prompt, when the client asked for it).
    """

    is_streaming: bool
    has_log_probs: bool
    hidden_token_ids: frozenset[int]
    prefix: str = ""


@dataclass(slots=True)
class _Pending:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class Relay:
    """One request's outgoing side. `flush` belongs to the sending thread.

    Attributes:
        on_first_token: Called once, when the first token has been handed to Triton (or kept, if not streaming).
        on_stop_word: Called once, when a stop word ended the text; tokens after it are dropped.
        on_sent_last: Called once, after the last response.
    """

    def __init__(
        self, exchange: Exchange, detokenizer: Detokenizer, stop_words: StopMatcher, options: RelayOptions
    ) -> None:
        self._exchange = exchange
        self._detokenizer = detokenizer
        self._stop_words = stop_words
        self._options = options
        self._pending = _Pending(text=[options.prefix] if options.prefix else [])
        self._num_output_tokens = 0
        self.num_responses = 0
        self.has_hit_stop_word = False
        self.on_first_token: Callable[[], object] = _ignore
        self.on_stop_word: Callable[[], object] = _ignore
        self.on_sent_last: Callable[[], object] = _ignore

    def flush(self, items: list[RelayItem]) -> None:
        """Send everything in `items`, as one response where it can be."""
        end = next((item for item in items if isinstance(item, End)), None)
        was_silent = self._num_output_tokens == 0
        for item in items:
            if isinstance(item, NewTokens) and not self.has_hit_stop_word:
                self._take(item)
        try:
            if end is not None:
                self._send_last(end)
            elif self._options.is_streaming and self._pending.token_ids:
                self._send(self._delta(b""))
        finally:
            if was_silent and self._num_output_tokens:
                self.on_first_token()
            if end is not None:
                self.on_sent_last()

    def _take(self, tokens: NewTokens) -> None:
        self._num_output_tokens += len(tokens.token_ids)
        self._pending.token_ids.extend(tokens.token_ids)
        self._pending.log_probs.extend(tokens.log_probs)
        visible = [token for token in tokens.token_ids if token not in self._options.hidden_token_ids]
        self._take_text(self._detokenizer.push(visible))

    def _take_text(self, text: str) -> None:
        passed, is_hit = self._stop_words.push(text)
        self._pending.text.append(passed)
        if is_hit:
            self.has_hit_stop_word = True
            self.on_stop_word()

    def _send_last(self, end: End) -> None:
        if not self.has_hit_stop_word:
            self._take_text(self._detokenizer.flush())
        if not self.has_hit_stop_word:
            self._pending.text.append(self._stop_words.flush())
        reason = FinishReason.STOP if self.has_hit_stop_word else end.finish_reason
        outputs = self._delta(reason.value.encode())
        self._send({**outputs, **end.summary(self._num_output_tokens)}, is_final=True)

    def _delta(self, finish_reason: bytes) -> dict[str, npt.NDArray[Any]]:
        pending, self._pending = self._pending, _Pending()
        outputs: dict[str, npt.NDArray[Any]] = {
            "text_output": np.array(["".join(pending.text).encode()], dtype=np.object_),
            "output_ids": np.array(pending.token_ids, dtype=np.int32),
            "sequence_index": np.zeros(1, dtype=np.int32),
            "finish_reason": np.array([finish_reason], dtype=np.object_),
        }
        if self._options.has_log_probs:
            outputs["output_log_probs"] = np.array(pending.log_probs, dtype=np.float32)
        return outputs

    def _send(self, outputs: Tensors, is_final: bool = False) -> None:
        self.num_responses += 1
        self._exchange.send(outputs, is_final)


def _ignore() -> None:
    pass
