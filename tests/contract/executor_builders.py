"""The engines under contract. A further one is a builder and a line in `EXECUTORS` (docs/executors.md)."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from executor_harness import BLOCK_SIZE, NUM_BLOCKS

from kelp.core.clock import SystemClock
from kelp.core.config import ExecutorConfig, MockConfig
from kelp.executor.base import Executor
from kelp.executor.batching.executor import BatchingExecutor
from kelp.executor.mock.load import load_mock_executor
from kelp.executor.torch.load import load_parts
from kelp.executor.torch.options import TorchExecutorOptions


def build_torch(folder: Path, max_running: int = 8, max_waiting: int = 64, max_in_flight: int = 1) -> Executor:
    """A torch executor small enough to run out of everything."""
    options = TorchExecutorOptions(
        dtype="float32",
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        max_step_tokens=8,
        max_running=max_running,
        max_waiting=max_waiting,
        num_draft_tokens=4,
        threads=1,
    )
    parts = load_parts(folder, options)
    rules = replace(parts.rules, max_in_flight=max_in_flight)
    return BatchingExecutor(replace(parts, rules=rules), SystemClock())


def build_mock(folder: Path, max_running: int = 8, max_waiting: int = 64, tokens_per_step: int = 1) -> Executor:
    """A mock of the same size that takes no time."""
    options = ExecutorConfig(
        engine="mock",
        dtype="float32",
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        max_step_tokens=8,
        max_running=max_running,
        max_waiting=max_waiting,
    )
    return load_mock_executor(folder, options, MockConfig(speedup=0, tokens_per_step=tokens_per_step))


EXECUTORS = [
    pytest.param(build_torch, id="torch"),
    pytest.param(partial(build_torch, max_in_flight=2), id="torch-overlapped"),
    pytest.param(build_mock, id="mock"),
    pytest.param(partial(build_mock, tokens_per_step=4), id="mock-drafting"),
]
