"""A `ModelRunner` that computes states instead of activations, and waits instead of computing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kelp.executor.batching.batch import Chunk, Finished, Launched, Sampled
from kelp.executor.mock.language import FEW, Vocabulary, next_state, next_states
from kelp.executor.mock.memory import KVMemory
from kelp.executor.mock.pace import Pace
from kelp.timing.model import TimingModel

_LOG_PROB = 0.0
"""Of every token: nothing else could have been said."""
_PAUSE_S = 2e-5


@dataclass(frozen=True, slots=True)
class Pacing:
    """What steps take, and on which clock."""

    timing: TimingModel
    pace: Pace


@dataclass(frozen=True, slots=True)
class _Running:
    sampled: list[Sampled]
    pace: Pace
    end_s: float

    def result(self) -> list[Sampled]:
        self.pace.wait(self.end_s)
        return self.sampled


class MockRunner:
    """See `batch.ModelRunner`.

    Args:
        pacing: None for steps that take no time.
    """

    def __init__(
        self,
        memory: KVMemory,
        vocabulary: Vocabulary,
        pacing: Pacing | None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._memory = memory
        self._vocabulary = vocabulary
        self._pacing = pacing
        self._sleep = sleep
        self._has_begun_answers = False

    def launch(self, chunks: Sequence[Chunk]) -> Launched:
        """See `batch.ModelRunner`; every chunk's tokens must be known."""
        if self._pacing is None:
            self._let_others_run(chunks)
        sampled: list[Sampled] = []
        for chunk in chunks:
            assert chunk.token_source is None
            sampled += [Sampled(token_id, _LOG_PROB) for token_id in self._compute(chunk)]
        if self._pacing is None:
            return Finished(sampled)
        return _Running(sampled, self._pacing.pace, self._pacing.pace.begin(_batch_s(self._pacing.timing, chunks)))

    def _let_others_run(self, chunks: Sequence[Chunk]) -> None:
        """Pause where the step before this one has begun an answer.

        A device would compute now, and the threads that send would run. Without a pause they get the interpreter's
        lock after 5 ms only, when the whole answer may be there.
        """
        if self._has_begun_answers:
            self._sleep(_PAUSE_S)
        self._has_begun_answers = any(_begins_answer(chunk) for chunk in chunks)

    def _compute(self, chunk: Chunk) -> list[int]:
        """Write the chunk's KV; returns the token of each sample point."""
        state = self._memory.state_before(chunk.block_ids, chunk.start)
        num_samples = len(chunk.samples)
        if len(chunk.tokens) > FEW:
            many = next_states(state, chunk.tokens, chunk.start)
            self._memory.write(chunk.block_ids, chunk.start, many)
            if num_samples > FEW:
                return self._vocabulary.tokens_after(many[-num_samples:], chunk.samples[0].params)
            states = many[len(many) - num_samples :].tolist()
        else:
            states = self._advance(chunk, state)[len(chunk.tokens) - num_samples :]
        return [self._vocabulary.token_after(state, chunk.samples[0].params) for state in states]

    def _advance(self, chunk: Chunk, state: int) -> list[int]:
        states = []
        for position, token_id in enumerate(chunk.tokens.tolist(), chunk.start):
            state = next_state(state, token_id, position)
            self._memory.write_one(chunk.block_ids, position, state)
            states.append(state)
        return states


def _begins_answer(chunk: Chunk) -> bool:
    return bool(chunk.samples) and chunk.start < chunk.samples[0].num_prompt_tokens


def _batch_s(timing: TimingModel, chunks: Sequence[Chunk]) -> float:
    prefills: list[tuple[int, int]] = []
    contexts: list[int] = []
    for chunk in chunks:
        num_new = len(chunk.tokens) - chunk.num_drafts
        if num_new == 1 and chunk.samples:
            contexts.append(chunk.start)
        else:
            prefills.append((num_new, chunk.start))
    return timing.batch_s(prefills, contexts)
