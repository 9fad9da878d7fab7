"""A mock engine without a thread, on a clock that its own steps move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kelp.core.clock import FakeClock
from kelp.core.config import ExecutorConfig, MockConfig
from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import Role
from kelp.executor.base import Completed, ExecutorEvent, ExecutorRequest, Tokens
from kelp.executor.batching.engine import Engine
from kelp.executor.mock.language import Vocabulary
from kelp.executor.mock.load import MockParts, load_mock_parts
from kelp.executor.mock.pace import VirtualPace
from kelp.kv.pool import BlockPool

VOCAB_SIZE, EOS = 500, 2
VOCABULARY = Vocabulary(VOCAB_SIZE, (EOS,))
CONFIG = f'{{"vocab_size": {VOCAB_SIZE}, "max_position_embeddings": 4096, "eos_token_id": {EOS}}}'


def write_mock_model(folder: Path) -> Path:
    """All that a mock needs of a model."""
    (folder / "config.json").write_text(CONFIG)
    return folder


def executor_config(**fields: Any) -> ExecutorConfig:
    return ExecutorConfig(**{"engine": "mock", "block_size": 4, "num_blocks": 64, **fields})


def request(prompt: list[int], max_tokens: int, events: list[ExecutorEvent], **fields: Any) -> ExecutorRequest:
    beside = {name: fields.pop(name) for name in ("role", "num_generated", "request_id") if name in fields}
    return ExecutorRequest(
        request_id=beside.pop("request_id", f"request-{id(events)}"),
        prompt=np.asarray(prompt, np.int32),
        role=beside.pop("role", Role.AGGREGATED),
        sampling=SamplingParams(max_tokens=max_tokens, **fields),
        seed_hash=seed_hash("mock"),
        sink=events.append,
        **beside,
    )


def tokens_of(events: list[ExecutorEvent]) -> list[int]:
    return [token for event in events if isinstance(event, Tokens) for token in event.token_ids]


class MockRig:
    """Engine, pool and parts, stepped by hand."""

    def __init__(self, folder: Path, mock: MockConfig | None = None, **options: Any) -> None:
        self.clock = FakeClock()
        self.parts: MockParts = load_mock_parts(
            write_mock_model(folder), executor_config(**options), mock or MockConfig(), lambda: VirtualPace(self.clock)
        )
        batching = self.parts.batching
        self.pool = BlockPool(batching.layout.num_blocks)
        self.engine = Engine(batching.runner, self.pool, batching.rules, self.clock, proposer=batching.proposer)

    def submit(self, prompt: list[int], max_tokens: int, **fields: Any) -> list[ExecutorEvent]:
        events: list[ExecutorEvent] = []
        self.engine.add(request(prompt, max_tokens, events, **fields), self.clock.wall_ns())
        return events

    def run(self) -> int:
        """Step until nothing is left to do; returns how many steps took time."""
        num_steps = 0
        before_s = self.clock.monotonic_s()
        while self.engine.step():
            num_steps += self.clock.monotonic_s() > before_s
            before_s = self.clock.monotonic_s()
            self.pool.check_integrity()
        return num_steps

    def answer(self, prompt: list[int], max_tokens: int, **fields: Any) -> list[int]:
        events = self.submit(prompt, max_tokens, **fields)
        self.run()
        assert isinstance(events[-1], Completed)
        return tokens_of(events)

    def elapsed_s(self, prompt: list[int], max_tokens: int) -> float:
        started_s = self.clock.monotonic_s()
        self.answer(prompt, max_tokens)
        return self.clock.monotonic_s() - started_s


@pytest.fixture
def rig(tmp_path: Path) -> MockRig:
    return MockRig(tmp_path)
