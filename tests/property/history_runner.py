"""A model whose KV is the token ids themselves, on a device that computes as late as it may.

The next token depends on every token read back from the blocks, so any block that is lost, shared wrongly, freed early
or overwritten shows as a wrong token.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kelp.core.types import BlockId, FinishReason
from kelp.executor.batching.batch import Chunk, Sampled
from kelp.executor.batching.drafts import DraftContext

BLOCK_SIZE = 3
VOCAB_SIZE = 20
EOS = 19
GARBAGE = -7


def next_token(history: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(history, np.int32).tobytes()) % VOCAB_SIZE


def reference(prompt: Sequence[int], max_tokens: int) -> tuple[list[int], FinishReason]:
    history = list(prompt)
    for _ in range(max_tokens):
        history.append(next_token(history))
        if history[-1] == EOS:
            return history[len(prompt) :], FinishReason.STOP
    return history[len(prompt) :], FinishReason.LENGTH


class MostlyRight:
    """Drafts with an error now and then, as a function of the history alone."""

    def propose(self, contexts: Sequence[DraftContext]) -> list[np.ndarray]:
        return [self._guess(context.tokens.tolist(), context.max_tokens) for context in contexts]

    def _guess(self, history: list[int], max_tokens: int) -> np.ndarray:
        start = len(history)
        for _ in range((start * 5 + max_tokens) % (max_tokens + 1)):
            right = next_token(history)
            history.append(right if zlib.crc32(bytes([right, len(history)])) % 4 else (right + 1) % VOCAB_SIZE)
        return np.asarray(history[start:], np.int32)


@dataclass
class LateStep:
    """Computes when its result is asked for, after every step launched before."""

    runner: "HistoryRunner"
    chunks: list[Chunk]
    sampled: list[Sampled] | None = None

    def result(self) -> list[Sampled]:
        self.runner.compute_until(self)
        assert self.sampled is not None
        return self.sampled


@dataclass
class HistoryRunner:
    num_blocks: int
    max_step_tokens: int
    launched: list[LateStep] = field(default_factory=list)
    num_computed_tokens: int = 0

    def __post_init__(self) -> None:
        self.memory = np.full((self.num_blocks, BLOCK_SIZE), GARBAGE, np.int32)
        self.last: list[Sampled] = []

    def launch(self, chunks: Sequence[Chunk]) -> LateStep:
        assert 0 < sum(len(chunk.tokens) for chunk in chunks) <= self.max_step_tokens
        own = [replace(chunk, tokens=chunk.tokens.copy(), block_ids=list(chunk.block_ids)) for chunk in chunks]
        self.launched.append(LateStep(self, own))
        return self.launched[-1]

    def compute_until(self, step: LateStep) -> None:
        while step.sampled is None:
            first = self.launched.pop(0)
            first.sampled = self.last = self.compute(first.chunks)

    def compute(self, chunks: list[Chunk]) -> list[Sampled]:
        for chunk in chunks:
            if chunk.token_source is not None:
                chunk.tokens[:] = [self.last[chunk.token_source].token_id]
            self.num_computed_tokens += len(chunk.tokens)
            for offset, token in enumerate(chunk.tokens):
                block, slot = divmod(chunk.start + offset, BLOCK_SIZE)
                self.memory[chunk.block_ids[block], slot] = token
        return [self.choose(chunk, index) for chunk in chunks for index in range(len(chunk.samples))]

    def choose(self, chunk: Chunk, index: int) -> Sampled:
        kv = self.memory[list(chunk.block_ids)].ravel()[: chunk.start + len(chunk.tokens)].tolist()
        history = kv[: len(kv) - chunk.num_drafts + index]
        tokens = chunk.samples[index].tokens
        assert len(tokens) == len(history)
        assert chunk.token_source is not None or tokens.tolist() == history
        return Sampled(next_token(history), -1.0)

    def write(self, block_ids: Sequence[BlockId], tokens: Sequence[int]) -> None:
        for position, token in enumerate(tokens):
            self.memory[block_ids[position // BLOCK_SIZE], position % BLOCK_SIZE] = token
