"""The mock as a whole: what it makes of transferred blocks, what it refuses, what it does not import."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mock_rig import VOCABULARY, executor_config, request, write_mock_model

from kelp.core.clock import FakeClock
from kelp.core.config import MockConfig
from kelp.core.errors import ConfigError, InternalError, NotSupported
from kelp.core.guide_spec import GuideSpec
from kelp.core.types import Role
from kelp.executor.base import Completed, ExecutorEvent, Failed, Reserved, Tokens
from kelp.executor.batching.batch import Chunk
from kelp.executor.mock.executor import Delays, MockExecutor
from kelp.executor.mock.language import EMPTY, next_states
from kelp.executor.mock.load import load_mock_executor, load_mock_parts
from kelp.executor.mock.mishaps import BreakableRunner, Hang, MishapRunner
from kelp.executor.mock.runner import MockRunner
from support.waiting import wait_until

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
FIRST = VOCABULARY.continuation(PROMPT, 1)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_mock_model(tmp_path)


@pytest.fixture
def executor(folder: Path) -> Iterator[MockExecutor]:
    executor = load_mock_executor(folder, executor_config(), MockConfig(speedup=1e6))
    yield executor
    executor.close()


def importing(executor: MockExecutor) -> tuple[list[ExecutorEvent], Reserved]:
    events: list[ExecutorEvent] = []
    executor.submit(request(PROMPT, 6, events, role=Role.DECODE, request_id="import"))
    wait_until(lambda: any(isinstance(event, Reserved) for event in events), "the reservation")
    return events, next(event for event in events if isinstance(event, Reserved))


def put_kv(executor: MockExecutor, reserved: Reserved, prompt: list[int]) -> None:
    """What a transfer from a worker that computed `prompt` does."""
    executor._kv.write(reserved.block_ids, 0, next_states(EMPTY, request(prompt, 1, []).prompt, 0))


def end_of(events: list[ExecutorEvent]) -> Completed | Failed:
    wait_until(lambda: isinstance(events[-1], Completed | Failed), "the end")
    end = events[-1]
    assert isinstance(end, Completed | Failed)
    return end


def all_blocks_free(executor: MockExecutor) -> bool:
    load = executor.load()
    return load.num_free_blocks + load.num_cached_blocks == executor.layout.num_blocks


def test_the_prompts_kv_is_continued_after_the_transfers_time(executor: MockExecutor) -> None:
    events, reserved = importing(executor)
    put_kv(executor, reserved, PROMPT)
    executor.complete_import("import", FIRST, 0.0, 3)
    assert isinstance(end_of(events), Completed)
    said = [token for event in events if isinstance(event, Tokens) for token in event.token_ids]
    assert [FIRST, *said] == VOCABULARY.continuation(PROMPT, 6)


@pytest.mark.parametrize("computed", [[*PROMPT[:-1], 4], [7, *PROMPT[1:]], []], ids=["tail", "head", "nothing"])
def test_kv_of_another_prompt_fails_the_request_loudly_and_is_freed(
    executor: MockExecutor, computed: list[int]
) -> None:
    events, reserved = importing(executor)
    put_kv(executor, reserved, computed)
    executor.complete_import("import", FIRST, 0.0, 3)
    end = end_of(events)
    assert isinstance(end, Failed) and isinstance(end.error, InternalError)
    assert "does not hold the prompt's KV" in end.error.text
    wait_until(lambda: all_blocks_free(executor), "free blocks")


def test_an_import_that_was_aborted_during_its_delay_gives_its_blocks_back(folder: Path) -> None:
    executor = load_mock_executor(folder, executor_config(), MockConfig(timing={"transfer_s": 0.05}))
    try:
        events, reserved = importing(executor)
        put_kv(executor, reserved, PROMPT)
        executor.complete_import("import", FIRST, 0.0, 3)
        executor.abort("import")
        assert isinstance(end_of(events), Completed)
        wait_until(lambda: all_blocks_free(executor), "free blocks")
    finally:
        executor.close()


def test_delayed_actions_run_in_order_of_their_times_and_not_before() -> None:
    clock, ran, both = FakeClock(), [], threading.Event()
    delays = Delays(clock)
    try:
        delays.after(5.0, lambda: (ran.append("second"), both.set()))
        delays.after(2.0, lambda: ran.append("first"))
        now = threading.Event()
        delays.after(0.0, now.set)
        assert now.wait(10.0)
        assert ran == []
        clock.advance(5.0)
        delays.after(100.0, lambda: ran.append("never"))
        assert both.wait(10.0)
        assert ran == ["first", "second"]
    finally:
        delays.close()


def test_guides_are_refused(executor: MockExecutor) -> None:
    with pytest.raises(NotSupported):
        executor.submit(request(PROMPT, 3, [], guide=GuideSpec(kind="regex", text="a+")))


@pytest.mark.parametrize(
    ("config", "field"),
    [("{}", "vocab_size"), ('{"vocab_size": 9}', "max_position_embeddings"), ("[]", "config.json")],
)
def test_a_model_folder_that_says_too_little_is_refused(tmp_path: Path, config: str, field: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=field):
        load_mock_parts(tmp_path, executor_config(), MockConfig())


def test_a_step_too_small_for_its_sequences_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"executor\.max_step_tokens: 3 is below executor\.max_running 4"):
        load_mock_parts(folder, executor_config(max_step_tokens=3, max_running=4), MockConfig())


def test_a_configured_length_may_exceed_the_models(folder: Path) -> None:
    parts = load_mock_parts(folder, executor_config(max_model_tokens=200_000), MockConfig())
    assert parts.batching.limits.max_model_tokens == 200_000


def test_a_pool_of_no_given_size_has_one(folder: Path) -> None:
    assert load_mock_parts(folder, executor_config(num_blocks=0), MockConfig()).batching.layout.num_blocks == 4096


_WORKER = """
import sys
from kelp.build.worker import build_executor
from kelp.core.config import load_config
from kelp.transport import open_agent
executor = build_executor(load_config({"executor.engine": "mock", "model.path": sys.argv[1]}))
open_agent(sys.argv[2], "mock").close()
executor.close()
print(*sorted(sys.modules.keys() & {"jinja2", "torch", "transformers", "tritonclient"}))
"""


@pytest.mark.parametrize("transport", ["local", pytest.param("nixl", marks=pytest.mark.nixl)])
def test_a_mock_worker_starts_without_the_imports_that_cost_most(folder: Path, transport: str) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl_cu12", reason="nixl is not installed (make setup)")
    command = [sys.executable, "-c", _WORKER, str(folder), transport]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_only_a_step_that_computes_the_fatal_token_crashes() -> None:
    launched: list[Sequence[Chunk]] = []
    ends: list[str] = []
    inner = SimpleNamespace(launch=launched.append)
    runner = MishapRunner(inner, 7, lambda: ends.append("crash"))
    harmless, fatal = (Chunk(np.array(tokens, dtype=np.int32), 0, ()) for tokens in ([1, 2, 17], [3, 7]))
    runner.launch([harmless])
    assert ends == [] and launched == [[harmless]]
    runner.launch([harmless, fatal])
    assert ends == ["crash"]


def test_an_engine_that_recovers_hangs_once() -> None:
    slept: list[float] = []
    hang = Hang(7.0, slept.append)
    for _ in range(3):
        hang()
    assert slept == [7.0]


def test_an_engine_that_breaks_fails_at_every_step_from_then_on() -> None:
    launched: list[Sequence[Chunk]] = []
    runner = BreakableRunner(SimpleNamespace(launch=launched.append), 7)
    harmless, breaking = (Chunk(np.array(tokens, dtype=np.int32), 0, ()) for tokens in ([1, 2, 17], [3, 7]))
    runner.launch([harmless])
    for chunks in ([harmless, breaking], [harmless]):
        with pytest.raises(RuntimeError, match="faulted"):
            runner.launch(chunks)
    assert launched == [[harmless]]


def test_without_a_fatal_token_nothing_stands_between_engine_and_runner(folder: Path) -> None:
    assert isinstance(load_mock_parts(folder, executor_config(), MockConfig()).batching.runner, MockRunner)
    for mishap in (MockConfig(fatal_token_id=0), MockConfig(hang_token_id=0)):
        assert isinstance(load_mock_parts(folder, executor_config(), mishap).batching.runner, MishapRunner)
    breaking = MockConfig(breaking_token_id=0)
    assert isinstance(load_mock_parts(folder, executor_config(), breaking).batching.runner, BreakableRunner)
