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
from kelp.executor.torch.batch import Chunk, Sampled
from kelp.executor.torch.engine import Engine, EngineRules
from kelp.executor.torch.scheduler import SchedulerLimits
from kelp.executor.torch.sequence import SequenceRules
from kelp.kv.pool import BlockPool

EOS = 50


class CountingRunner:
    """The next token is the last one plus 1."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def run(self, chunks: Sequence[Chunk]) -> list[Sampled]:
        self.batches.append([len(chunk.tokens) for chunk in chunks])
        return [Sampled(int(chunk.tokens[-1]) + 1, -0.5) for chunk in chunks for _ in chunk.samples]


class Bench:
    def __init__(self, num_blocks: int = 16, budget: int = 16, max_running: int = 8) -> None:
        self.runner = CountingRunner()
        self.pool = BlockPool(num_blocks)
        self.clock = FakeClock()
        self.retired: list[str] = []
        self.events: dict[str, list[ExecutorEvent]] = {}
        rules = EngineRules(SequenceRules(4, (EOS,)), SchedulerLimits(budget, max_running, True), 100)
        self.engine = Engine(self.runner, self.pool, rules, self.clock, self.retired.append)

    def submit(
        self, request_id: str, num_tokens: int, role: Role = Role.AGGREGATED, **fields: object
    ) -> list[ExecutorEvent]:
        events = self.events[request_id] = []
        deadline_s = fields.pop("deadline_s", None)
        start = fields.pop("start", 0)
        request = ExecutorRequest(
            request_id=request_id,
            prompt=np.arange(start, start + num_tokens, dtype=np.int32),
            role=role,
            sampling=SamplingParams(**fields),
            seed_hash=seed_hash("counting"),
            sink=events.append,
            deadline_s=deadline_s,
        )
        self.engine.add(request, 1)
        return events

    def run(self) -> None:
        while self.engine.step():
            self.pool.check_integrity()


def tokens(events: list[ExecutorEvent]) -> list[int]:
    return [token for event in events if isinstance(event, Tokens) for token in event.token_ids]


def reason(events: list[ExecutorEvent]) -> FinishReason | None:
    assert isinstance(events[-1], Completed)
    return events[-1].finish_reason
