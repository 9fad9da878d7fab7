"""Guided decoding without weights: a byte-level vocabulary, a model whose logits are noise, and an engine around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kelp.core.clock import FakeClock
from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import FinishReason, Role
from kelp.executor.base import Completed, ExecutorEvent, ExecutorRequest, Failed, Tokens
from kelp.executor.batching.batch import Chunk, Finished, ModelRunner, SamplePoint
from kelp.executor.batching.engine import Engine, EngineRules
from kelp.executor.batching.guided import start_guide
from kelp.executor.batching.history import SequenceRules
from kelp.executor.batching.scheduler import SchedulerLimits
from kelp.executor.batching.speculation import SpeculationRules
from kelp.executor.torch.sampler import sample
from kelp.kv.pool import BlockPool
from kelp.text.grammar import GrammarCompiler

_MERGES = ["tr", "true", "nu", "null", '":', '",', "12", "ab", "abc", '{"', '"}', "é"]
_SPECIAL = "<|end|>"
_PADDING = 9
PROMPT = (5, 6, 7)


def _spelling(text: str) -> str:
    ((piece, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return str(piece)


def write_vocabulary(folder: Path) -> Tokenizer:
    """Write a tokenizer.json: every byte, some longer pieces, and an end token, which comes last."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for text in _MERGES:
        spelling = _spelling(text)
        for length in range(2, len(spelling) + 1):
            if spelling[:length] not in pieces:
                pieces.append(spelling[:length])
                merges.append((spelling[: length - 1], spelling[length - 1]))
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_SPECIAL, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


class NoiseRunner:
    """Logits are a function of the tokens so far and of nothing else; end tokens are no likelier than others."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def launch(self, chunks: Sequence[Chunk]) -> Finished:
        points = [point for chunk in chunks for point in chunk.samples]
        rows = [self._logits(point) for point in points]
        return Finished(sample(torch.stack(rows) if rows else torch.empty(0, self._vocab_size), points))

    def _logits(self, point: SamplePoint) -> torch.Tensor:
        noise = np.random.default_rng(point.tokens.tolist()).standard_normal(self._vocab_size, np.float32)
        return torch.from_numpy(noise * 3)


@dataclass(frozen=True)
class GuidedAnswer:
    """What a guided request came to."""

    token_ids: list[int]
    end: Completed | Failed

    @property
    def reason(self) -> FinishReason | None:
        assert isinstance(self.end, Completed), self.end
        return self.end.finish_reason


class GuidedBench:
    """Runs single requests through a real engine; the vocabulary is padded beyond the tokenizer's size."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = write_vocabulary(folder)
        self.num_known = self.tokenizer.get_vocab_size()
        self.eos = self.tokenizer.token_to_id(_SPECIAL)
        self.vocab_size = self.num_known + _PADDING
        self.compiler = GrammarCompiler(folder, self.vocab_size, (self.eos,))

    def text(self, token_ids: Sequence[int]) -> str:
        """Decoded without the end token."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def request(self, sampling: SamplingParams, output: Sequence[int] = (), **fields: object) -> ExecutorRequest:
        """A request that resumes after `output`."""
        request = ExecutorRequest(
            request_id="guided",
            prompt=np.asarray([*PROMPT, *output], np.int32),
            role=Role.AGGREGATED,
            sampling=sampling,
            seed_hash=seed_hash("noise"),
            sink=lambda event: None,
            num_generated=len(output),
        )
        return replace(request, **fields)  # type: ignore[arg-type]

    def run(self, sampling: SamplingParams, output: Sequence[int] = (), num_drafts: int = 0) -> GuidedAnswer:
        """Run one request to its end."""
        engine = self.engine(num_drafts)
        events = self.add(engine, self.request(sampling, output))
        while engine.step():
            pass
        return answer(events)

    def add(self, engine: Engine, request: ExecutorRequest) -> list[ExecutorEvent]:
        """Queue a request; its events appear in the list."""
        events: list[ExecutorEvent] = []
        engine.add(replace(request, sink=events.append), 1, start_guide(self.compiler, request))
        return events

    def engine(self, num_drafts: int = 0, num_blocks: int = 2000, runner: ModelRunner | None = None) -> Engine:
        """An engine without a thread."""
        rules = EngineRules(
            SequenceRules(4, (self.eos,)),
            SchedulerLimits(64, 8, True),
            self.vocab_size,
            SpeculationRules(num_draft_tokens=num_drafts),
        )
        return Engine(runner or NoiseRunner(self.vocab_size), BlockPool(num_blocks), rules, FakeClock())


def answer(events: Sequence[ExecutorEvent]) -> GuidedAnswer:
    """What the events of a request that has ended come to."""
    end = events[-1]
    assert isinstance(end, Completed | Failed)
    return GuidedAnswer([token for event in events if isinstance(event, Tokens) for token in event.token_ids], end)
