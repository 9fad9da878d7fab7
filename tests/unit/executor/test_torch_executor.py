"""The thread around the engine, with a model that fails."""

import logging
import queue
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from kelp.core.clock import SystemClock
from kelp.core.errors import InternalError
from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import KVLayout, Role
from kelp.executor.base import Completed, ExecutorEvent, ExecutorLimits, ExecutorRequest, Failed, PoolMemory
from kelp.executor.torch.batch import Chunk, Sampled
from kelp.executor.torch.engine import EngineRules
from kelp.executor.torch.executor import TorchExecutor, TorchExecutorParts
from kelp.executor.torch.scheduler import SchedulerLimits
from kelp.executor.torch.sequence import SequenceRules

POISON = 13
WAIT_S = 30.0


class PoisonedRunner:
    def run(self, chunks: Sequence[Chunk]) -> list[Sampled]:
        if any(POISON in chunk.tokens for chunk in chunks):
            raise RuntimeError("out of memory")
        return [Sampled(1, -0.1) for chunk in chunks for _ in chunk.samples]


@pytest.fixture
def executor() -> Iterator[TorchExecutor]:
    executor = TorchExecutor(
        TorchExecutorParts(
            runner=PoisonedRunner(),
            layout=KVLayout(8, 1, 1, 4, 8, "float32", "poisoned"),
            limits=ExecutorLimits(32, 20, ()),
            memory=PoolMemory(4096, 1, "cpu", None),
            rules=EngineRules(SequenceRules(4, ()), SchedulerLimits(16, 4, True), 20),
            max_waiting=4,
        ),
        SystemClock(),
    )
    yield executor
    executor.close()


def end_of(executor: TorchExecutor, request_id: str, token: int) -> Completed | Failed:
    events: queue.SimpleQueue[ExecutorEvent] = queue.SimpleQueue()
    prompt = np.asarray([token] * 5, np.int32)
    sampling = SamplingParams(max_tokens=2)
    executor.submit(ExecutorRequest(request_id, prompt, Role.AGGREGATED, sampling, seed_hash("m"), events.put))
    while True:
        event = events.get(timeout=WAIT_S)
        if isinstance(event, Completed | Failed):
            return event


def test_a_failing_step_fails_its_requests_and_the_engine_serves_the_next(executor, caplog):
    with caplog.at_level(logging.CRITICAL, logger="kelp.executor.torch.executor"):
        end = end_of(executor, "bad", POISON)
    assert isinstance(end, Failed) and isinstance(end.error, InternalError)
    assert "out of memory" in end.error.text
    assert isinstance(end_of(executor, "good", 1), Completed)
    load = executor.load()
    assert load.num_free_blocks + load.num_cached_blocks == 8


def test_blocks_of_a_failed_step_never_enter_the_prefix_cache(executor):
    assert isinstance(end_of(executor, "bad", POISON), Failed)
    assert executor.load().num_cached_blocks == 0
