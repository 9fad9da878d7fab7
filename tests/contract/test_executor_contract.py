"""What `executor.base.Executor` promises about one request and about many, on every engine that runs here."""

import time

import pytest
from executor_harness import BLOCK_SIZE, MAX_MODEL_TOKENS, NUM_BLOCKS, PROMPT, VOCAB_SIZE, Client

from kelp.core.errors import CapacityError, DeadlineExceeded, InvalidRequest, KelpError, PromptTooLong, WorkerLost
from kelp.core.types import FinishReason, HandoffShape, Role
from kelp.executor.base import Admitted, Completed, Failed, Reserved, Tokens


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


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 4}])
def test_however_many_tokens_an_event_carries_they_are_those_of_single_steps(client, sampling):
    prompt = PROMPT * 4
    whole = client.aggregated_tokens(prompt, max_tokens=40, **sampling)
    single: list[int] = []
    for num_generated in range(40):
        step = client.submit(prompt + single, max_tokens=num_generated + 1, num_generated=num_generated, **sampling)
        assert step.finish_reason() is FinishReason.LENGTH
        single += step.tokens
    assert whole == single


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 11, "frequency_penalty": 0.5}])
def test_a_resumed_request_goes_on_as_the_interrupted_one_would_have(client, sampling):
    whole = client.aggregated_tokens(PROMPT, max_tokens=9, **sampling)
    resumed = client.submit(PROMPT + whole[:4], max_tokens=9, num_generated=4, **sampling)
    assert resumed.finish_reason() is FinishReason.LENGTH
    assert resumed.tokens == whole[4:]


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
    live = [client.submit(PROMPT, Role.DECODE), client.submit(PROMPT[::-1], Role.DECODE)]
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
