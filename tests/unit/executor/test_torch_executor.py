"""The thread around the engine, with a model that fails."""

import asyncio
import logging
import math
import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from kelp.core.clock import Clock, FakeClock, SystemClock
from kelp.core.errors import EngineFailed, InvalidRequest, NotFound
from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import KVLayout, Role
from kelp.executor.base import Completed, ExecutorEvent, ExecutorLimits, ExecutorRequest, Failed, PoolMemory
from kelp.executor.batching.batch import Chunk, Finished, ModelRunner, Sampled
from kelp.executor.batching.engine import EngineRules
from kelp.executor.batching.executor import BatchingExecutor, BatchingExecutorParts
from kelp.executor.batching.history import SequenceRules
from kelp.executor.batching.scheduler import SchedulerLimits
from kelp.worker.self_test import SelfTest
from support.waiting import wait_until

POISON = 13
DIGEST = "0f" * 16
WAIT_S = 30.0


class PoisonedRunner:
    def launch(self, chunks: Sequence[Chunk]) -> Finished:
        if any(POISON in chunk.tokens for chunk in chunks):
            raise RuntimeError("out of memory")
        return Finished([Sampled(1, -0.1) for chunk in chunks for _ in chunk.samples])


class BrokenRunner:
    def launch(self, chunks: Sequence[Chunk]) -> Finished:
        raise RuntimeError("an illegal memory access was encountered")


class StuckRunner:
    def __init__(self) -> None:
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def launch(self, chunks: Sequence[Chunk]) -> Finished:
        self.has_begun.set()
        assert self.may_end.wait(WAIT_S)
        return Finished([Sampled(1, -0.1) for chunk in chunks for _ in chunk.samples])


class DyingRunner:
    def launch(self, chunks: Sequence[Chunk]) -> Finished:
        raise SystemExit


def executor_of(runner: ModelRunner, clock: Clock) -> BatchingExecutor:
    return BatchingExecutor(
        BatchingExecutorParts(
            runner=runner,
            layout=KVLayout(8, 1, 1, 4, 8, "float32", "poisoned"),
            limits=ExecutorLimits(32, 20, (), {"sql": DIGEST}),
            memory=PoolMemory(4096, 1, "cpu", None),
            rules=EngineRules(SequenceRules(4, ()), SchedulerLimits(16, 4, True), 20),
            max_waiting=4,
        ),
        clock,
    )


@pytest.fixture
def executor() -> Iterator[BatchingExecutor]:
    executor = executor_of(PoisonedRunner(), SystemClock())
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
    assert isinstance(end, Failed) and isinstance(end.error, EngineFailed)
    assert "out of memory" in end.error.text
    assert isinstance(end_of(executor, "good", 1), Completed)
    load = executor.load()
    assert load.num_free_blocks + load.num_cached_blocks == 8


def test_steps_that_failed_one_after_the_other_are_counted_until_a_token_comes(executor):
    assert executor.load().num_failed_steps == 0
    for number in range(3):
        assert isinstance(end_of(executor, f"bad {number}", POISON), Failed)
    assert executor.load().num_failed_steps == 3
    assert isinstance(end_of(executor, "good", 1), Completed)
    assert executor.load().num_failed_steps == 0


def test_an_engine_passes_its_own_test_unless_it_fails(executor):
    assert not asyncio.run(SelfTest(executor).has_failed(WAIT_S))
    broken = executor_of(BrokenRunner(), SystemClock())
    try:
        assert asyncio.run(SelfTest(broken).has_failed(WAIT_S))
    finally:
        broken.close()


def test_blocks_of_a_failed_step_never_enter_the_prefix_cache(executor):
    assert isinstance(end_of(executor, "bad", POISON), Failed)
    assert executor.load().num_cached_blocks == 0


def test_a_step_that_does_not_end_shows_in_the_load():
    runner, clock = StuckRunner(), FakeClock()
    executor = executor_of(runner, clock)
    thread = threading.Thread(target=end_of, args=(executor, "stuck", 1))
    thread.start()
    try:
        assert runner.has_begun.wait(WAIT_S)
        clock.advance(70.0)
        assert executor.load().step_s == 70.0
    finally:
        runner.may_end.set()
        thread.join()
        executor.close()
    assert executor.load().step_s == 0.0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_has_died_is_stuck_for_ever():
    executor = executor_of(DyingRunner(), SystemClock())
    sampling = SamplingParams(max_tokens=2)
    prompt = np.asarray([1] * 5, np.int32)
    executor.submit(ExecutorRequest("r", prompt, Role.AGGREGATED, sampling, seed_hash("m"), lambda _: None))
    wait_until(lambda: executor.load().step_s == math.inf, "the end of the thread")
    executor.close()


def test_an_adapter_is_refused_unless_its_name_is_known_and_its_content_is_what_the_blocks_are_named_after(executor):
    assert isinstance(end_of(executor, "a", 1, lora_name="sql", lora_digest=DIGEST), Completed)
    with pytest.raises(InvalidRequest, match="lora_name: 'x' given, this worker's adapters: sql"):
        end_of(executor, "b", 1, lora_name="x", lora_digest=DIGEST)
    for digest in ("", "f0" * 16):
        with pytest.raises(NotFound, match="lora_name: this worker loaded another content of 'sql'"):
            end_of(executor, "c", 1, lora_name="sql", lora_digest=digest)
    assert executor.load().num_waiting == 0
