"""What `executor.base.Executor` promises, on every implementation that runs here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from executor_harness import (
    BLOCK_SIZE,
    MAX_MODEL_TOKENS,
    NUM_BLOCKS,
    VOCAB_SIZE,
    Build,
    Client,
    build_torch,
    copy_missing_blocks,
    write_tiny_model,
)

from kelp.core.errors import CapacityError, DeadlineExceeded, InvalidRequest, KelpError, PromptTooLong, WorkerLost
from kelp.core.types import FinishReason, HandoffShape, Role, num_blocks_for
from kelp.executor.base import Admitted, Completed, Executor, Failed, Prefilled, Reserved, Tokens

PROMPT = [5, 9, 2, 40, 33, 7, 7, 1, 60, 12]

EXECUTORS = [pytest.param(build_torch, id="torch")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("contract-model"))


@pytest.fixture(params=EXECUTORS)
def build(request: pytest.FixtureRequest, folder: Path) -> Iterator[Build]:
    built: list[Executor] = []

    def build_one(**options: int) -> Executor:
        built.append(request.param(folder, **options))
        return built[-1]

    yield build_one
    for executor in built:
        executor.close()


@pytest.fixture
def client(build: Build) -> Client:
    return Client(build())


def test_layout_limits_and_memory_describe_one_pool(client):
    executor = client.executor
    assert executor.layout.num_blocks == NUM_BLOCKS
    assert executor.layout.block_size == BLOCK_SIZE
    assert executor.limits.vocab_size == VOCAB_SIZE
    assert executor.limits.max_model_tokens == MAX_MODEL_TOKENS
    assert executor.pool_memory.num_bytes == executor.layout.pool_bytes
    assert executor.pool_memory.base_address > 0
    assert isinstance(executor.handoff_shape, HandoffShape)


def test_an_aggregated_request_is_admitted_streams_and_completes_once(client):
    recorder = client.submit(PROMPT, max_tokens=6)
    assert recorder.finish_reason() is FinishReason.LENGTH
    client.settle()
    kinds = [type(event) for event in recorder.events]
    assert kinds[0] is Admitted
    assert kinds[-1] is Completed
    assert set(kinds[1:-1]) == {Tokens}
    assert len(recorder.tokens) == 6


def test_every_token_comes_with_a_log_prob(client):
    recorder = client.submit(PROMPT, max_tokens=5)
    recorder.end()
    for event in recorder.events:
        if isinstance(event, Tokens):
            assert len(event.token_ids) == len(event.log_probs)
            assert all(log_prob <= 0 for log_prob in event.log_probs)


def test_a_stop_token_is_emitted_and_ends_the_sequence(client):
    expected = client.aggregated_tokens(PROMPT, max_tokens=8)
    stop = expected[3]
    recorder = client.submit(PROMPT, max_tokens=8, stop_token_ids=(stop,))
    assert recorder.finish_reason() is FinishReason.STOP
    assert recorder.tokens == expected[: expected.index(stop) + 1]


def test_stamps_are_in_order(client):
    recorder = client.submit(PROMPT, max_tokens=3)
    timings = recorder.end().timings
    names = ("arrival", "first_scheduled", "prefill_done", "first_token", "last_token")
    stamps = [getattr(timings, f"{name}_ns") for name in names]
    assert stamps == sorted(stamps)
    assert stamps[0] > 0


def test_a_repeated_prompt_reports_its_cached_tokens(client):
    first, second = [client.submit(PROMPT, max_tokens=1).end() for _ in range(2)]
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == 8
    assert second.usage.reused_blocks == 2


def test_concurrent_requests_get_the_tokens_they_would_get_alone(client):
    prompts = [PROMPT[index:] + PROMPT[: index + 3] for index in range(8)]
    alone = [client.aggregated_tokens(prompt, max_tokens=12) for prompt in prompts]
    together = [client.submit(prompt, max_tokens=12) for prompt in prompts]
    for expected, recorder in zip(alone, together, strict=True):
        assert recorder.finish_reason() is FinishReason.LENGTH
        assert recorder.tokens == expected
    assert client.num_unheld_blocks() == NUM_BLOCKS


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 11, "frequency_penalty": 0.5}])
def test_a_resumed_request_goes_on_as_the_interrupted_one_would_have(client, sampling):
    whole = client.aggregated_tokens(PROMPT, max_tokens=9, **sampling)
    resumed = client.submit(PROMPT + whole[:4], max_tokens=9, num_generated=4, **sampling)
    assert resumed.finish_reason() is FinishReason.LENGTH
    assert resumed.tokens == whole[4:]


def test_a_prefill_announces_every_prompt_block_and_yields_one_token(client):
    recorder = client.submit(PROMPT, Role.PREFILL, max_tokens=6)
    assert recorder.finish_reason() is None
    announcements = [event for event in recorder.events if isinstance(event, Prefilled)]
    assert announcements[-1].num_tokens == len(PROMPT)
    assert len(set(recorder.announced)) == num_blocks_for(len(PROMPT), BLOCK_SIZE)
    assert recorder.tokens == client.aggregated_tokens(PROMPT, max_tokens=1)


def test_exported_blocks_stay_held_until_released(client):
    recorder = client.submit(PROMPT, Role.PREFILL)
    recorder.end()
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS - 3
    for _ in range(2):
        client.executor.release_export(recorder.request_id)
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.2}])
def test_a_handoff_gives_the_tokens_of_an_aggregated_run(build, sampling):
    source, target = Client(build()), Client(build())
    expected = source.aggregated_tokens(PROMPT, max_tokens=9, **sampling)
    exported = source.submit(PROMPT, Role.PREFILL, max_tokens=9, **sampling)
    imported = target.submit(PROMPT, Role.DECODE, max_tokens=9, **sampling)
    reserved = imported.wait_for(Reserved)
    exported.end()
    num_moved = copy_missing_blocks(source.executor, exported.announced, target.executor, reserved)
    source.executor.release_export(exported.request_id)
    first = exported.wait_for(Tokens)
    target.executor.complete_import(imported.request_id, first.token_ids[0], first.log_probs[0], num_moved)
    end = imported.end()
    assert isinstance(end, Completed)
    assert exported.tokens + imported.tokens == expected
    assert end.usage.transferred_blocks == num_moved == 3
    source.settle()
    assert source.num_unheld_blocks() == target.num_unheld_blocks() == NUM_BLOCKS


def test_a_failed_import_is_computed_locally(client):
    expected = client.aggregated_tokens(PROMPT, max_tokens=5)
    imported = client.submit(PROMPT, Role.DECODE, max_tokens=5)
    imported.wait_for(Reserved)
    client.executor.fail_import(imported.request_id)
    assert imported.finish_reason() is FinishReason.LENGTH
    assert imported.tokens == expected


def test_an_abort_ends_a_running_request_with_cancelled(client):
    def abort_at_first_token(event: object) -> None:
        if isinstance(event, Tokens):
            client.executor.abort("victim")

    recorder = client.submit(PROMPT, max_tokens=60, request_id="victim", on_event=abort_at_first_token)
    assert recorder.finish_reason() is FinishReason.CANCELLED
    assert len(recorder.tokens) < 60
    client.executor.abort("victim")
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS


def test_an_import_aborted_before_completion_keeps_its_blocks_until_end_import(client):
    imported = client.submit(PROMPT, Role.DECODE)
    reserved = imported.wait_for(Reserved)
    client.executor.abort(imported.request_id)
    assert imported.finish_reason() is FinishReason.CANCELLED
    assert client.num_unheld_blocks() == NUM_BLOCKS - len(reserved.block_ids)
    client.executor.end_import(imported.request_id)
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS


@pytest.mark.parametrize(
    ("prompt", "fields", "error_type", "text"),
    [
        ([], {}, InvalidRequest, "empty"),
        ([1, VOCAB_SIZE], {}, InvalidRequest, f"vocabulary has {VOCAB_SIZE}"),
        ([1, -1], {}, InvalidRequest, "-1"),
        ([1] * 100, {"max_tokens": 29}, PromptTooLong, "100 tokens plus max_tokens 29"),
        ([1] * 90, {"max_tokens": 8}, PromptTooLong, f"executor.num_blocks is {NUM_BLOCKS}"),
        ([1] * 4, {"max_tokens": 3, "num_generated": 3}, InvalidRequest, "num_generated: 3"),
        ([1] * 2, {"max_tokens": 9, "num_generated": 2}, InvalidRequest, "num_generated: 2"),
    ],
)
def test_a_request_that_can_never_run_is_refused_at_once(client, prompt, fields, error_type, text):
    with pytest.raises(error_type) as refusal:
        client.submit(prompt, **fields)
    assert text in refusal.value.text


def test_a_prefill_needs_room_for_its_prompt_only(client):
    recorder = client.submit([1] * 95, Role.PREFILL, max_tokens=33)
    assert recorder.finish_reason() is None


def test_an_id_is_refused_while_anything_of_it_is_held_and_free_afterwards(client):
    client.submit(PROMPT, Role.PREFILL, request_id="twice").end()
    with pytest.raises(InvalidRequest, match="'twice' is in use"):
        client.submit(PROMPT, request_id="twice")
    client.executor.release_export("twice")
    client.settle()
    assert client.submit(PROMPT, request_id="twice").finish_reason() is FinishReason.LENGTH


def test_a_full_waiting_queue_refuses_with_capacity(build):
    client = Client(build(max_running=1, max_waiting=1))
    occupant = client.submit(PROMPT, Role.DECODE)
    occupant.wait_for(Reserved)
    waiting = client.submit(PROMPT, max_tokens=2)
    with pytest.raises(CapacityError, match="executor.max_waiting is 1"):
        client.submit(PROMPT)
    client.executor.fail_import(occupant.request_id)
    assert waiting.finish_reason() is FinishReason.LENGTH


def test_a_passed_deadline_fails_the_request_and_frees_it(client):
    recorder = client.submit(PROMPT, deadline_s=time.monotonic() - 1)
    end = recorder.end()
    assert isinstance(end, Failed) and isinstance(end.error, DeadlineExceeded)
    assert client.num_unheld_blocks() == NUM_BLOCKS


def test_a_deadline_wakes_an_idle_executor(client):
    recorder = client.submit(PROMPT, Role.DECODE, deadline_s=time.monotonic() + 0.05)
    recorder.wait_for(Reserved)
    end = recorder.end()
    assert isinstance(end, Failed) and isinstance(end.error, DeadlineExceeded)


def test_commands_for_unknown_ids_are_ignored(client):
    executor = client.executor
    executor.abort("nobody")
    executor.complete_import("nobody", 1, 0.0, 0)
    executor.fail_import("nobody")
    executor.end_import("nobody")
    executor.release_export("nobody")
    client.settle()
    assert client.num_unheld_blocks() == NUM_BLOCKS


def test_a_sink_that_raises_ends_its_own_request_only(client):
    def explode(event: object) -> None:
        raise RuntimeError("the loop is closed")

    broken = client.submit(PROMPT, max_tokens=60, on_event=explode)
    healthy = client.submit(PROMPT, max_tokens=4)
    assert healthy.finish_reason() is FinishReason.LENGTH
    assert broken.finish_reason() is FinishReason.CANCELLED
    assert client.num_unheld_blocks() == NUM_BLOCKS


def test_closing_fails_every_live_request_and_refuses_new_ones(build):
    client = Client(build())
    live = [client.submit(PROMPT, Role.DECODE), client.submit(PROMPT, Role.DECODE)]
    live[1].wait_for(Reserved)
    client.executor.close()
    client.executor.close()
    for recorder in live:
        end = recorder.end()
        assert isinstance(end, Failed) and isinstance(end.error, KelpError)
    with pytest.raises(WorkerLost):
        client.submit(PROMPT)


def test_load_counts_what_runs_and_what_waits(build):
    client = Client(build(max_running=1))
    occupant = client.submit(PROMPT, Role.DECODE)
    occupant.wait_for(Reserved)
    client.submit(PROMPT)
    load = client.executor.load()
    assert (load.num_running, load.num_waiting) == (1, 1)
    assert load.num_free_blocks == NUM_BLOCKS - 3
