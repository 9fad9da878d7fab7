"""The thread around the engine, with a model that fails."""

import logging
import queue
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from kelp.core.clock import SystemClock
from kelp.core.errors import InternalError, InvalidRequest, NotFound
from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import KVLayout, Role
from kelp.executor.base import Completed, ExecutorEvent, ExecutorLimits, ExecutorRequest, Failed, PoolMemory
from kelp.executor.batching.batch import Chunk, Finished, Sampled
from kelp.executor.batching.engine import EngineRules
from kelp.executor.batching.executor import BatchingExecutor, BatchingExecutorParts
from kelp.executor.batching.history import SequenceRules
from kelp.executor.batching.scheduler import SchedulerLimits

POISON = 13
DIGEST = "0f" * 16
WAIT_S = 30.0


class PoisonedRunner:
    def launch(self, chunks: Sequence[Chunk]) -> Finished:
        if any(POISON in chunk.tokens for chunk in chunks):
            raise RuntimeError("out of memory")
        return Finished([Sampled(1, -0.1) for chunk in chunks for _ in chunk.samples])


@pytest.fixture
def executor() -> Iterator[BatchingExecutor]:
    executor = BatchingExecutor(
        BatchingExecutorParts(
            runner=PoisonedRunner(),
            layout=KVLayout(8, 1, 1, 4, 8, "float32", "poisoned"),
            limits=ExecutorLimits(32, 20, (), {"sql": DIGEST}),
            memory=PoolMemory(4096, 1, "cpu", None),
            rules=EngineRules(SequenceRules(4, ()), SchedulerLimits(16, 4, True), 20),
            max_waiting=4,
        ),
        SystemClock(),
    )
    yield executor
    executor.close()


def end_of(executor: BatchingExecutor, request_id: str, token: int, **fields: str) -> Completed | Failed:
    events: queue.SimpleQueue[ExecutorEvent] = queue.SimpleQueue()
    prompt = np.asarray([token] * 5, np.int32)
    sampling = SamplingParams(max_tokens=2)
    executor.submit(
        ExecutorRequest(request_id, prompt, Role.AGGREGATED, sampling, seed_hash("m"), events.put, **fields)
    )
    while True:
        event = events.get(timeout=WAIT_S)
        if isinstance(event, Completed | Failed):
            return event


def test_a_failing_step_fails_its_requests_and_the_engine_serves_the_next(executor, caplog):
    with caplog.at_level(logging.CRITICAL, logger="kelp.executor.batching.executor"):
        end = end_of(executor, "bad", POISON)
    assert isinstance(end, Failed) and isinstance(end.error, InternalError)
    assert "out of memory" in end.error.text
    assert isinstance(end_of(executor, "good", 1), Completed)
    load = executor.load()
    assert load.num_free_blocks + load.num_cached_blocks == 8


def test_blocks_of_a_failed_step_never_enter_the_prefix_cache(executor):
    assert isinstance(end_of(executor, "bad", POISON), Failed)
    assert executor.load().num_cached_blocks == 0


def test_an_adapter_is_refused_unless_its_name_is_known_and_its_content_is_what_the_blocks_are_named_after(executor):
    assert isinstance(end_of(executor, "a", 1, lora_name="sql", lora_digest=DIGEST), Completed)
    with pytest.raises(InvalidRequest, match="lora_name: 'x' given, this worker's adapters: sql"):
        end_of(executor, "b", 1, lora_name="x", lora_digest=DIGEST)
    for digest in ("", "f0" * 16):
        with pytest.raises(NotFound, match="lora_name: this worker loaded another content of 'sql'"):
            end_of(executor, "c", 1, lora_name="sql", lora_digest=digest)
    assert executor.load().num_waiting == 0
