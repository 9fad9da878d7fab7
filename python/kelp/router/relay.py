"""From worker tokens to client responses: take, coalesce, send.

Runs in the sending thread (`core.outbox`), so a busy relay makes responses larger instead of slower; the first token of
a stream passes it by where it has nothing to do. A worker speaks tokens only; a change of worker is invisible here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kelp.core.exchange import Exchange, Tensors
from kelp.core.types import FinishReason
from kelp.router.sequence_text import SequenceText


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens of one sequence to relay, with their log-probs."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    sequence_index: int = 0


@dataclass(frozen=True, slots=True)
class End:
    """One sequence has ended, and why."""

    finish_reason: FinishReason
    sequence_index: int = 0


RelayItem = NewTokens | End


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """How the client wants its answer.

    Attributes:
        is_streaming: Deltas as they come, each response of one sequence; or one response of all at the end.
        num_input_tokens: Prompt length, part of every `sequence_length`.
    """

    is_streaming: bool
    has_log_probs: bool
    num_input_tokens: int


class Relay:
    """One request's outgoing side. `flush` is called by one thread at a time.

    Attributes:
        summary: Tensors of the request's last response alone, from the number of output tokens of all sequences.
        on_first_token: Called once, when the first token has been handed to Triton (or kept, if not streaming).
        on_stop_word: Called once per sequence, when a stop word ended its text; tokens after it are dropped.
        on_sent_last: Called once, after the last response.
    """

    def __init__(self, exchange: Exchange, sequences: Sequence[SequenceText], options: RelayOptions) -> None:
        self._exchange = exchange
        self._sequences = sequences
        self._options = options
        self.num_responses = 0
        self.summary: Callable[[int], Tensors] = _nothing
        self.on_first_token: Callable[[], object] = _ignore
        self.on_stop_word: Callable[[int], object] = _ignore
        self.on_sent_last: Callable[[], object] = _ignore

    @property
    def is_streaming(self) -> bool:
        """Whether tokens go out before all are there."""
        return self._options.is_streaming

    def flush(self, items: list[RelayItem]) -> None:
        """Send everything in `items`, as one response (per sequence, when streaming) where it can be."""
        was_silent = self._num_output_tokens() == 0
        for item in items:
            self._take(item)
        is_over = all(sequence.finish_reason is not None for sequence in self._sequences)
        try:
            if self._options.is_streaming:
                self._stream({item.sequence_index for item in items if isinstance(item, End)}, is_over)
            elif is_over:
                self._send(range(len(self._sequences)), is_final=True)
        finally:
            if was_silent and self._num_output_tokens():
                self.on_first_token()
            if is_over:
                self.on_sent_last()

    def _num_output_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self._sequences)

    def _take(self, item: RelayItem) -> None:
        sequence = self._sequences[item.sequence_index]
        had_hit_stop_word = sequence.has_hit_stop_word
        if isinstance(item, NewTokens):
            sequence.take(item.token_ids, item.log_probs)
        else:
            sequence.end(item.finish_reason)
        if sequence.has_hit_stop_word and not had_hit_stop_word:
            self.on_stop_word(item.sequence_index)

    def _stream(self, just_ended: set[int], is_over: bool) -> None:
        due = [index for index, text in enumerate(self._sequences) if text.has_tokens or index in just_ended]
        for index in due:
            self._send([index], is_final=is_over and index == due[-1])

    def _send(self, indices: Sequence[int], is_final: bool) -> None:
        outputs = self._outputs(indices)
        if is_final:
            outputs |= self.summary(self._num_output_tokens())
        self.num_responses += 1
        self._exchange.send(outputs, is_final)

    def _outputs(self, indices: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
        sequences = [self._sequences[index] for index in indices]
        deltas = [sequence.drain() for sequence in sequences]
        reasons = [sequence.finish_reason for sequence in sequences]
        outputs: dict[str, npt.NDArray[Any]] = {
            "text_output": np.array(["".join(delta.text).encode() for delta in deltas], dtype=np.object_),
            "output_ids": np.array([token for delta in deltas for token in delta.token_ids], dtype=np.int32),
            "sequence_index": np.array(indices, dtype=np.int32),
            "finish_reason": np.array([reason.value.encode() if reason else b"" for reason in reasons], np.object_),
        }
        if self._options.has_log_probs:
            log_probs = [log_prob for delta in deltas for log_prob in delta.log_probs]
            outputs["output_log_probs"] = np.array(log_probs, dtype=np.float32)
        if None not in reasons:
            lengths = [self._options.num_input_tokens + sequence.num_tokens for sequence in sequences]
            outputs["sequence_length"] = np.array(lengths, dtype=np.int32)
        return outputs


def _nothing(num_output_tokens: int) -> Tensors:
    return {}


def _ignore(*_: object) -> None:
    pass
