"""An engine whose model counts upwards, stepped by hand."""

from collections.abc import Sequence

import numpy as np

from kelp.core.clock import FakeClock
from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import FinishReason, Role
from kelp.executor.base import (
    Completed,
    ExecutorEvent,
    ExecutorRequest,
    Tokens,
)
from kelp.executor.batching.batch import Chunk, Finished, Sampled
from kelp.executor.batching.drafts import DraftProposer, NgramProposer
from kelp.executor.batching.engine import Engine, EngineRules
from kelp.executor.batching.guide import Guide
from kelp.executor.batching.history import SequenceRules
from kelp.executor.batching.scheduler import SchedulerLimits
from kelp.executor.batching.speculation import SpeculationRules
from kelp.kv.pool import BlockPool

EOS = 50


class CountingRunner:
    """The next token is the last one plus 1, modulo `period`."""

    def __init__(self, period: int = 1000) -> None:
        self.period = period
        self.batches: list[list[int]] = []
        self.launches: list[list[Chunk]] = []
        self.sampled: list[Sampled] = []

    def launch(self, chunks: Sequence[Chunk]) -> Finished:
        self.launches.append(list(chunks))
        self.batches.append([len(chunk.tokens) for chunk in chunks])
        self.sampled = [self.after(token) for chunk in chunks for token in self.last_inputs(chunk)]
        return Finished(self.sampled)

    def last_inputs(self, chunk: Chunk) -> list[int]:
        if chunk.token_source is not None:
            return [self.sampled[chunk.token_source].token_id] * len(chunk.samples)
        return chunk.tokens[len(chunk.tokens) - len(chunk.samples) :].tolist()

    def after(self, token: int) -> Sampled:
        return Sampled((token + 1) % self.period, -0.5)


class Bench:
    def __init__(
        self,
        num_blocks: int = 16,
        budget: int = 16,
        max_running: int = 8,
        speculation: SpeculationRules | None = None,
        max_in_flight: int = 1,
        period: int = 1000,
        proposer: DraftProposer | None = None,
    ) -> None:
        self.runner = CountingRunner(period)
        self.pool = BlockPool(num_blocks)
        self.clock = FakeClock()
        self.retired: list[str] = []
        self.events: dict[str, list[ExecutorEvent]] = {}
        rules = EngineRules(
            sequence=SequenceRules(4, (EOS,)),
            scheduler=SchedulerLimits(budget, max_running, True),
            vocab_size=100,
            speculation=speculation or SpeculationRules(),
            max_in_flight=max_in_flight,
        )
        self.engine = Engine(
            self.runner, self.pool, rules, self.clock, self.retired.append, proposer or NgramProposer()
        )

    def submit(
        self, request_id: str, num_tokens: int, role: Role = Role.AGGREGATED, **fields: object
    ) -> list[ExecutorEvent]:
        """A prompt that counts up from `start`, or `prompt` itself."""
        events = self.events[request_id] = []
        deadline_s = fields.pop("deadline_s", None)
        start = fields.pop("start", 0)
        prompt = fields.pop("prompt", range(start, start + num_tokens))
        guide: Guide | None = fields.pop("guide", None)
        request = ExecutorRequest(
            request_id=request_id,
            prompt=np.asarray(prompt, dtype=np.int32),
            role=role,
            sampling=SamplingParams(**fields),
            seed_hash=seed_hash("counting"),
            sink=events.append,
            deadline_s=deadline_s,
        )
        self.engine.add(request, 1, guide)
        return events

    def run(self) -> None:
        while self.engine.step():
            self.pool.check_integrity()


def tokens(events: list[ExecutorEvent]) -> list[int]:
    return [token for event in events if isinstance(event, Tokens) for token in event.token_ids]


def reason(events: list[ExecutorEvent]) -> FinishReason | None:
    assert isinstance(events[-1], Completed)
    return events[-1].finish_reason
