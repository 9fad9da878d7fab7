"""Commands, aggregated requests, keep-alives: what every role of worker does."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import numpy as np
import pytest
from worker_rig import PROMPT, completed, events, generate_command, last, open_worker, token

from kelp.core.errors import (
    CapacityError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    KelpError,
    PromptTooLong,
    ProtocolError,
    RequestCancelled,
)
from kelp.core.messages import CancelCommand, Finished, Progress, RequestUsage
from kelp.core.types import FinishReason, Role
from kelp.core.wire import encode_message
from kelp.executor.base import Admitted, Failed, Tokens
from support.exchange import bytes_tensor
from support.waiting import until

GENERATE = encode_message(generate_command(Role.AGGREGATED, None))


@pytest.mark.parametrize(
    ("inputs", "error", "field"),
    [
        ({}, InvalidRequest, "command"),
        ({"command": np.array([b"{}", b"{}"], dtype=np.object_)}, InvalidRequest, "command"),
        ({"command": bytes_tensor(b"\xff")}, ProtocolError, "command"),
        ({"command": bytes_tensor("{}")}, ProtocolError, "command"),
        ({"command": bytes_tensor('{"op": "explode"}')}, ProtocolError, "command"),
        ({"command": bytes_tensor('{"op": "status", "more": 1}')}, ProtocolError, "command: status.more"),
        ({"command": bytes_tensor('{"op": "drain", "timeout_s": -1}')}, ProtocolError, "timeout_s"),
        ({"command": bytes_tensor(GENERATE)}, InvalidRequest, "input_ids"),
        ({"command": bytes_tensor(GENERATE), "input_ids": PROMPT.astype(np.int64)}, InvalidRequest, "input_ids"),
        ({"command": bytes_tensor(GENERATE), "input_ids": PROMPT.reshape(2, 4)}, InvalidRequest, "input_ids"),
    ],
    ids=[
        "no command",
        "two commands",
        "not UTF-8",
        "no operation",
        "unknown operation",
        "unknown field",
        "negative time",
        "no prompt",
        "wrong type of prompt",
        "wrong shape of prompt",
    ],
)
def test_what_is_no_command_is_refused_by_field_and_the_worker_serves_on(
    inputs: dict[str, np.ndarray], error: type[KelpError], field: str
) -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            exchange, task = rig.send(**inputs)
            with pytest.raises(error, match=field):
                await task
            assert exchange.responses == [] and rig.executor.requests == []
            assert (await rig.status()).state == "ready"

    asyncio.run(scene())


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_disaggregated_command_needs_a_rendezvous(role: Role) -> None:
    async def scene() -> None:
        async with open_worker(role) as rig:
            _, task = await rig.generate(role)
            with pytest.raises(ProtocolError, match=r"command\.rendezvous"):
                await task
            assert rig.executor.requests == [] and rig.handoffs.num_leases == 0

    asyncio.run(scene())


def test_the_executor_gets_exactly_what_the_router_asked_for() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            before_s = time.monotonic()
            await rig.generate(num_generated=3, remaining_ms=5000.0, lora_name="sql", lora_digest="0f" * 16)
            (request,) = rig.executor.requests
            assert (request.role, request.num_generated) == (Role.AGGREGATED, 3)
            assert list(request.prompt) == list(PROMPT)
            assert request.seed_hash == bytes.fromhex("ab" * 16)
            assert (request.lora_name, request.lora_digest) == ("sql", "0f" * 16)
            assert request.deadline_s is not None
            assert before_s + 5 <= request.deadline_s <= time.monotonic() + 5

    asyncio.run(scene())


def test_attempts_of_one_request_do_not_get_into_each_others_way() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            await rig.generate()
            await rig.generate()
            first, second = rig.executor.requests
            assert first.request_id != second.request_id

    asyncio.run(scene())


def test_tokens_stream_and_the_last_response_says_how_it_ended() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            exchange, task = await rig.generate()
            rig.executor.emit(Admitted(RequestUsage(cached_tokens=4), 5), token(1))
            await until(lambda: exchange.token_ids == [1], "the first token")
            rig.executor.emit(Tokens((2, 3), (-1.0, -2.0)), completed(FinishReason.STOP, cached_tokens=4))
            await task
            assert exchange.token_ids == [1, 2, 3]
            log_probs = [float(value) for response in exchange.responses for value in response["output_log_probs"]]
            assert log_probs == [-0.5, -1.0, -2.0]
            finished = last(exchange)
            assert (finished.finish_reason, finished.usage.cached_tokens) == (FinishReason.STOP, 4)
            assert finished.timings.first_scheduled_ns == 5
            assert finished.timings.arrival_ns > 0
            assert finished.timings.last_token_ns == 9
            assert rig.executor.calls == []

    asyncio.run(scene())


def test_progress_comes_with_the_first_token_and_not_again() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            exchange, task = await rig.generate()
            rig.executor.emit(Admitted(RequestUsage(cached_tokens=4, new_blocks=1), 5))
            for number in range(3):
                rig.executor.emit(token(number))
                await until(lambda: len(exchange.token_ids) > number)  # noqa: B023 - called at once
            rig.executor.emit(completed())
            await task
            told = events(exchange)
            assert [type(event) for event in told] == [Progress, Finished]
            assert told[0].usage == RequestUsage(cached_tokens=4, new_blocks=1)
            assert told[0].timings.first_token_ns > 0
            assert "event" in exchange.responses[0]

    asyncio.run(scene())


def test_a_waiting_request_shows_that_the_worker_lives() -> None:
    async def scene() -> None:
        async with open_worker(idle_timeout_s=0.02) as rig:
            exchange, task = await rig.generate()
            await until(lambda: len(exchange.responses) >= 3, "keep-alives")
            assert exchange.token_ids == [] and events(exchange) == []
            rig.executor.emit(token(1), completed())
            await task
            num_responses = len(exchange.responses)
            other, _ = await rig.generate()
            await until(lambda: len(other.responses) >= 2, "keep-alives of the next request")
            assert len(exchange.responses) == num_responses, "a request that has ended is kept alive"

    asyncio.run(scene())


@pytest.mark.parametrize("num_said", [0, 1], ids=["waiting", "running"])
def test_a_router_that_goes_aborts_its_request(num_said: int) -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            exchange, task = await rig.generate()
            if num_said:
                rig.executor.emit(token(1))
            exchange.cancel()
            with pytest.raises(RequestCancelled):
                await task
            assert rig.executor.calls == [("abort", 0)]

    asyncio.run(scene())


@pytest.mark.parametrize("num_said", [0, 1], ids=["waiting", "running"])
def test_a_cancel_command_aborts_its_request_and_no_other(num_said: int) -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            _, staying = await rig.generate(request_id="staying")
            _, task = await rig.generate(request_id="leaving")
            if num_said:
                rig.executor.emit(token(1))
            answer, cancelling = rig.command(CancelCommand(request_id="leaving"))
            await cancelling
            assert answer.is_over
            with pytest.raises(RequestCancelled):
                await task
            assert rig.executor.calls == [("abort", 1)]
            rig.executor.emit(token(2), completed(), number=0)
            await staying

    asyncio.run(scene())


def test_a_cancel_command_that_overtakes_its_request_ends_it_as_soon_as_it_comes() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            _, cancelling = rig.command(CancelCommand(request_id="r"))
            await cancelling
            _, task = await rig.generate(request_id="r")
            with pytest.raises(RequestCancelled):
                await task
            assert (await rig.status()).num_running == 0

    asyncio.run(scene())


@pytest.mark.parametrize("error", [CapacityError("the queue is full"), PromptTooLong("9000 tokens")])
def test_what_the_executor_refuses_reaches_the_router_by_name(error: KelpError) -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            rig.executor.refusal = error
            _, task = await rig.generate()
            with pytest.raises(type(error)):
                await task

    asyncio.run(scene())


def test_a_request_that_the_executor_gives_up_fails_by_name_and_is_not_aborted() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            exchange, task = await rig.generate()
            rig.executor.emit(token(1), Failed(DeadlineExceeded("late")))
            with pytest.raises(DeadlineExceeded):
                await task
            assert exchange.token_ids in ([], [1])
            assert not exchange.is_over

    asyncio.run(scene())


def test_the_status_tells_load_pool_and_leases() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            await rig.generate()
            status = await rig.status()
            assert (status.worker, status.epoch, status.role) == ("host:1/decode", "epoch", Role.DECODE)
            assert (status.num_running, status.num_blocks, status.num_leases) == (1, 16, 0)

    asyncio.run(scene())


def test_the_worker_reports_its_load_as_gauges() -> None:
    async def scene() -> None:
        async with open_worker(heartbeat_s=0.01) as rig:
            await until(lambda: bool(rig.metrics.take()[1]), "a report")
            gauges = {
                (family.name, dict(labels).get("state")): value
                for (family, labels), value in rig.metrics.take()[1].items()
            }
            assert gauges["kelp_kv_blocks", "free"] == 16
            assert gauges["kelp_handoff_leases", None] == 0

    asyncio.run(scene())


def test_draft_counters_grow_by_what_the_executor_counted_since_the_last_report() -> None:
    async def scene() -> None:
        async with open_worker(heartbeat_s=0.01) as rig:
            seen: Counter[str] = Counter()

            def count() -> Counter[str]:
                for (family, _), value in rig.metrics.take()[0].items():
                    seen[family.name] += int(value)
                return seen

            for total in (10, 16):
                rig.executor.num_draft_tokens = total
                await until(lambda total=total: count()["kelp_accepted_tokens_total"] >= total // 2, "a report")
            assert seen["kelp_draft_tokens_total"] == 16

    asyncio.run(scene())


def test_a_response_that_cannot_be_sent_fails_its_request_instead_of_leaving_a_hole() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            exchange, task = await rig.generate()
            send, exchange.send = exchange.send, _broken  # type: ignore[method-assign]
            rig.executor.emit(token(1))
            with pytest.raises(InternalError, match="the pipe is gone"):
                await task
            exchange.send = send  # type: ignore[method-assign]
            rig.executor.emit(token(2), completed())
            assert rig.executor.calls == [("abort", 0)]
            assert exchange.responses == [] and not exchange.is_over

    asyncio.run(scene())


def test_a_last_response_that_cannot_be_sent_ends_its_request_with_an_error() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            exchange, task = await rig.generate()
            exchange.send = _broken  # type: ignore[method-assign]
            rig.executor.emit(token(1), completed())
            with pytest.raises(InternalError, match="the pipe is gone"):
                await task

    asyncio.run(scene())


def _broken(*_: object, **__: object) -> None:
    raise RuntimeError("the pipe is gone")
