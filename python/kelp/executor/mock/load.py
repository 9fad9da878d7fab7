"""Puts a mock executor together from configuration and the JSON files of a model folder; reads no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kelp.core.clock import SystemClock
from kelp.core.config import ExecutorConfig, MockConfig
from kelp.core.errors import ConfigError
from kelp.core.model_identity import model_identity
from kelp.executor.base import ExecutorLimits
from kelp.executor.batching.batch import ModelRunner
from kelp.executor.batching.engine import EngineRules
from kelp.executor.batching.executor import BatchingExecutorParts
from kelp.executor.batching.history import SequenceRules
from kelp.executor.batching.scheduler import SchedulerLimits
from kelp.executor.batching.speculation import SpeculationRules
from kelp.executor.mock.drafts import Foresight
from kelp.executor.mock.executor import MockExecutor
from kelp.executor.mock.language import Vocabulary
from kelp.executor.mock.memory import KVMemory, mock_layout
from kelp.executor.mock.mishaps import BreakableRunner, Hang, MishapRunner, die
from kelp.executor.mock.pace import Pace, RealPace
from kelp.executor.mock.runner import MockRunner, Pacing
from kelp.text.model_files import first_positive_int, read_json
from kelp.text.tokenizer import eos_token_ids
from kelp.timing.model import TimingModel

_AUTO_BLOCKS = 4096
_FREE_ROW = 1e-30
"""What a draft adds to a step that computes nothing, so little that the first step verifies as many as any other; see
`SpeculationRules.row_cost`."""


@dataclass(frozen=True, slots=True)
class MockParts:
    """A mock without its thread: `Engine(batching.runner, …)` steps it by hand.

    Attributes:
        timing: As fast as `mock.speedup` makes it; None for no time at all.
    """

    batching: BatchingExecutorParts
    memory: KVMemory
    timing: TimingModel | None


def load_mock_executor(model_folder: Path, executor: ExecutorConfig, mock: MockConfig) -> MockExecutor:
    """A running mock in real time; takes milliseconds.

    Raises:
        ConfigError: See `load_mock_parts`.
    """
    parts = load_mock_parts(model_folder, executor, mock)
    return MockExecutor(parts.batching, parts.memory, parts.timing, SystemClock())


def load_mock_parts(
    model_folder: Path, executor: ExecutorConfig, mock: MockConfig, make_pace: Callable[[], Pace] = RealPace
) -> MockParts:
    """Everything of `load_mock_executor` but the running engine.

    Raises:
        ConfigError: config.json is missing or does not say what a mock needs, or options contradict each other.
    """
    if executor.max_step_tokens < executor.max_running:
        raise ConfigError(
            f"executor.max_step_tokens: {executor.max_step_tokens} is below executor.max_running "
            f"{executor.max_running}; a step must hold one token of every running sequence"
        )
    timing = timing_model(mock)
    eos = eos_token_ids(model_folder)
    vocabulary = Vocabulary(_required(model_folder, "vocab_size"), tuple(sorted(eos)))
    max_model_tokens = executor.max_model_tokens or _required(model_folder, "max_position_embeddings")
    num_blocks = executor.num_blocks or _AUTO_BLOCKS
    layout = mock_layout(num_blocks, executor.block_size, executor.dtype, model_identity(model_folder))
    memory = KVMemory(layout)
    rules = EngineRules(
        sequence=SequenceRules(executor.block_size, eos),
        scheduler=SchedulerLimits(executor.max_step_tokens, executor.max_running, executor.enable_prefix_cache),
        vocab_size=vocabulary.size,
        speculation=SpeculationRules(mock.tokens_per_step - 1, _FREE_ROW),
    )
    runner: ModelRunner = MockRunner(memory, vocabulary, None if timing is None else Pacing(timing, make_pace()))
    if mock.fatal_token_id >= 0:
        runner = MishapRunner(runner, mock.fatal_token_id, die)
    if mock.hang_token_id >= 0:
        runner = MishapRunner(runner, mock.hang_token_id, Hang(mock.hang_s))
    if mock.breaking_token_id >= 0:
        runner = BreakableRunner(runner, mock.breaking_token_id)
    batching = BatchingExecutorParts(
        runner=runner,
        layout=layout,
        limits=ExecutorLimits(max_model_tokens, vocabulary.size, eos),
        memory=memory.pool,
        rules=rules,
        max_waiting=executor.max_waiting,
        proposer=Foresight(vocabulary),
    )
    return MockParts(batching, memory, timing)


def timing_model(mock: MockConfig) -> TimingModel | None:
    """The configured worker, `mock.speedup` times as fast; None for one that takes no time."""
    if not mock.speedup:
        return None
    return TimingModel(**mock.timing.model_dump()).scaled(1 / mock.speedup)


def _required(folder: Path, field: str) -> int:
    value = first_positive_int(read_json(folder, "config.json", is_required=True), field)
    if not value:
        raise ConfigError(f"model.path={folder}: config.json: {field}: a positive integer is required")
    return value
