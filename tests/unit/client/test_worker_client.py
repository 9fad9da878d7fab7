"""Workers over Triton's gRPC streams: what goes out, what comes back, and every way a stream ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import numpy as np
import pytest
from triton_double import TritonDouble, failure, open_triton, response, said

from kelp.client.base import WorkerAddress, WorkerOutput
from kelp.client.grpc import GrpcWorkerClient, shared_stream, workers
from kelp.core.errors import CapacityError, DeadlineExceeded, KelpError, ProtocolError, WorkerDied, WorkerLost
from kelp.core.messages import DrainCommand, Finished, GenerateCommand, SamplingParams, WorkerStatus
from kelp.core.types import FinishReason, Role
from kelp.core.wire import encode_message
from kelp.supervisor.ports import pick_free
from support.waiting import until
from support.worker_outputs import WorkerRequest

PROMPT = np.array([5, 6, 7], dtype=np.int32)
COMMAND = GenerateCommand(
    request_id="r", role=Role.AGGREGATED, sampling=SamplingParams(max_tokens=3), seed_hash_hex="0" * 32
)
FINISHED = Finished(finish_reason=FinishReason.STOP)
STATUS = WorkerStatus(
    worker="w", epoch="e", role=Role.DECODE, state="ready", num_running=1, num_waiting=0, num_blocks=4,
    num_free_blocks=3, num_cached_blocks=0, num_leases=0,
)  # fmt: skip


@contextlib.asynccontextmanager
async def open_client() -> AsyncIterator[GrpcWorkerClient]:
    client = GrpcWorkerClient()
    try:
        yield client
    finally:
        await client.close()


def address(triton: TritonDouble) -> WorkerAddress:
    return WorkerAddress(triton.endpoint, "decode")


async def collect(client: GrpcWorkerClient, triton: TritonDouble) -> list[WorkerOutput]:
    stream = WorkerRequest(client, address(triton), COMMAND, PROMPT)
    try:
        return [output async for output in stream]
    finally:
        await stream.close()


def test_a_request_is_the_command_and_the_prompt() -> None:
    async def scene() -> None:
        async with open_triton() as (triton, _), open_client() as client:
            assert await collect(client, triton) == []
            assert triton.requests[0].model_name == "decode"
            inputs = triton.inputs()
            assert json.loads(inputs["command"]) == json.loads(encode_message(COMMAND))
            assert list(inputs["input_ids"]) == [5, 6, 7]

    asyncio.run(scene())


def test_outputs_come_in_order_with_what_the_worker_tells() -> None:
    async def scene() -> None:
        answers = (said([1], [-0.5]), said([], []), said([2, 3], [-1.0, -2.0], encode_message(FINISHED)))
        async with open_triton(*answers) as (triton, _), open_client() as client:
            assert await collect(client, triton) == [
                WorkerOutput((1,), (-0.5,), None),
                WorkerOutput((), (), None),
                WorkerOutput((2, 3), (-1.0, -2.0), FINISHED),
            ]

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("[KELP_OVERLOADED] the queue is full", CapacityError),
        ("in ensemble 'x', [KELP_DEADLINE_EXCEEDED] late", DeadlineExceeded),
        ("Stub process 'decode_0_0' is not healthy.", WorkerDied),
        ("Request for unknown model: 'decode' is not found", WorkerLost),
        ("[KELP_FROM_THE_FUTURE] what is this", WorkerLost),
    ],
)
def test_an_error_of_the_server_arrives_by_name(message: str, error: type[KelpError]) -> None:
    async def scene() -> None:
        async with open_triton(said([1], [-0.5]), failure(message)) as (triton, _), open_client() as client:
            with pytest.raises(error) as raised:
                await collect(client, triton)
            if issubclass(error, WorkerLost):
                assert f"worker {triton.endpoint}/decode: " in str(raised.value), "a lost worker is named"

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (said([1, 2], [-0.5]), "2 tokens with 1 log_probs"),
        (said([1], [-0.5], b"not json"), "Invalid JSON"),
        (said([1], [-0.5], b'{"kind": "surprise"}'), "surprise"),
        (said([1], [-0.5], b'{"kind": "finished", "finish_reason": "bored"}'), "finish_reason"),
    ],
    ids=["uneven", "no JSON", "unknown kind", "unknown reason"],
)
def test_a_worker_that_talks_nonsense_breaks_the_protocol(answer: object, what: str) -> None:
    async def scene() -> None:
        async with open_triton(answer) as (triton, _), open_client() as client:
            with pytest.raises(ProtocolError, match=what):
                await collect(client, triton)

    asyncio.run(scene())


def test_a_server_that_dies_in_mid_stream_is_a_lost_worker() -> None:
    async def scene() -> None:
        async with open_triton(said([1], [-0.5]), stays_open=True) as (triton, server), open_client() as client:
            stream = WorkerRequest(client, address(triton), COMMAND, PROMPT)
            outputs = aiter_of(stream)
            assert (await outputs.__anext__()).token_ids == (1,)
            stopping = asyncio.ensure_future(server.stop(None))
            with pytest.raises(WorkerLost, match="connection broke"):
                await outputs.__anext__()
            await stream.close()
            await stopping

    asyncio.run(scene())


def aiter_of(stream: object) -> AsyncIterator[WorkerOutput]:
    return stream.__aiter__()  # type: ignore[attr-defined, no-any-return]


def test_a_server_that_is_not_there_is_a_lost_worker() -> None:
    async def scene() -> None:
        async with open_client() as client:
            nowhere = WorkerAddress(f"127.0.0.1:{pick_free('127.0.0.1')}", "decode")
            stream = WorkerRequest(client, nowhere, COMMAND, PROMPT)
            with pytest.raises(WorkerDied, match=f"worker {nowhere.endpoint}/decode: connection broke"):
                _ = [output async for output in stream]
            await stream.close()

    asyncio.run(scene())


@pytest.mark.parametrize("num_read", [0, 1], ids=["before the first output", "in mid stream"])
def test_closing_a_stream_has_the_worker_end_the_request_and_cancels_no_call(num_read: int) -> None:
    async def scene() -> None:
        async with open_triton(said([1], [-0.5]), stays_open=True) as (triton, _), open_client() as client:
            triton.cancel_answer = response(event=encode_message(STATUS))
            stream = WorkerRequest(client, address(triton), COMMAND, PROMPT)
            await until(lambda: bool(triton.requests), "the request")
            outputs = aiter_of(stream)
            for _ in range(num_read):
                await outputs.__anext__()
            await stream.close()
            await stream.close()
            assert triton.cancelled_ids == {COMMAND.request_id}
            assert len(triton.requests) == 2
            await until(lambda: triton.num_running == 0, "the end")
            assert triton.num_cancelled == 0

    asyncio.run(scene())


def test_closing_a_stream_whose_worker_does_not_listen_cancels_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_CANCEL_TIMEOUT_S", 0.02)
    monkeypatch.setattr(workers, "_DRAIN_TIMEOUT_S", 0.02)

    async def scene() -> None:
        async with open_triton(said([1], [-0.5]), stays_open=True) as (triton, _), open_client() as client:
            triton.heeds_cancel = False
            stream = WorkerRequest(client, address(triton), COMMAND, PROMPT)
            await until(lambda: bool(triton.requests), "the request")
            await stream.close()
            await until(lambda: triton.num_cancelled == 1, "the cancellation")
            with pytest.raises(WorkerLost, match="did not end the request"):
                _ = [output async for output in stream if not output.token_ids]
            triton.may_end.set()
            assert [output.token_ids for output in await collect(client, triton)] == [(1,)]
            assert triton.num_streams == 2, "others do not start on a call that has been given up"

    asyncio.run(scene())


@pytest.mark.parametrize(
    "last", [said([2], [-1.0], encode_message(FINISHED)), failure("[KELP_TRANSFER] gone")], ids=["finished", "failed"]
)
def test_a_request_that_has_ended_is_read_to_the_end_and_not_cancelled(last: object) -> None:
    async def scene() -> None:
        async with open_triton(last) as (triton, _), open_client() as client:
            stream = WorkerRequest(client, address(triton), COMMAND, PROMPT)
            with contextlib.suppress(KelpError):
                await aiter_of(stream).__anext__()
            await stream.close()
            await until(lambda: triton.num_running == 0, "the end")
            assert len(triton.requests) == 1
            assert triton.num_cancelled == 0

    asyncio.run(scene())


def test_a_reader_that_is_cancelled_while_it_waits_leaves_nothing_behind() -> None:
    async def scene() -> None:
        async with open_triton(stays_open=True) as (triton, _), open_client() as client:
            triton.cancel_answer = response(event=encode_message(STATUS))
            stream = WorkerRequest(client, address(triton), COMMAND, PROMPT)
            reading = asyncio.ensure_future(aiter_of(stream).__anext__())
            await until(lambda: bool(triton.requests), "the request")
            reading.cancel()
            closing = asyncio.ensure_future(stream.close())
            with pytest.raises(asyncio.CancelledError):
                await reading
            await closing
            await until(lambda: triton.num_running == 0, "the end")

    asyncio.run(scene())


def test_closing_one_stream_leaves_the_others_of_the_same_server_alone() -> None:
    async def scene() -> None:
        async with open_triton(said([1], [-0.5]), stays_open=True) as (triton, _), open_client() as client:
            triton.cancel_answer = response(event=encode_message(STATUS))
            other = COMMAND.model_copy(update={"request_id": "other"})
            leaving, staying = (WorkerRequest(client, address(triton), command, PROMPT) for command in (other, COMMAND))
            outputs = aiter_of(staying)
            await outputs.__anext__()
            await leaving.close()
            triton.may_end.set()
            assert [output async for output in outputs] == []

    asyncio.run(scene())


def test_a_stream_that_has_ended_is_closed_without_a_cancellation() -> None:
    async def scene() -> None:
        async with open_triton(said([1], [-0.5])) as (triton, _), open_client() as client:
            await collect(client, triton)
            assert triton.num_cancelled == 0

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("command", "operation"), [(None, "status"), (DrainCommand(timeout_s=5.0), "drain")], ids=["status", "drain"]
)
def test_control_asks_and_returns_the_status(command: DrainCommand | None, operation: str) -> None:
    async def scene() -> None:
        async with open_triton(response(event=encode_message(STATUS))) as (triton, _), open_client() as client:
            assert await client.control(address(triton), command) == STATUS
            inputs = triton.inputs()
            assert json.loads(inputs["command"])["op"] == operation
            assert "input_ids" not in inputs

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ((), ProtocolError),
        ((response(event=b"{}"),), ProtocolError),
        ((failure("[KELP_OVERLOADED] no"),), CapacityError),
    ],
    ids=["no answer", "garbage", "typed error"],
)
def test_control_does_not_take_anything_for_a_status(answers: tuple[object, ...], error: type[KelpError]) -> None:
    async def scene() -> None:
        async with open_triton(*answers) as (triton, _), open_client() as client:
            with pytest.raises(error):
                await client.control(address(triton), None)
            await until(lambda: triton.num_running == 0, "the end")

    asyncio.run(scene())


def test_requests_to_one_worker_share_a_stream_and_those_to_another_do_not() -> None:
    async def scene() -> None:
        async with open_triton(said([1], [-0.5])) as (triton, _), open_client() as client:
            others = [COMMAND.model_copy(update={"request_id": f"r{index}"}) for index in range(3)]
            streams = [WorkerRequest(client, address(triton), command, PROMPT) for command in others]
            for stream in streams:
                assert [output.token_ids async for output in stream] == [(1,)]
            assert (triton.num_streams, len(triton.requests)) == (1, 3)
            elsewhere = WorkerRequest(client, WorkerAddress(triton.endpoint, "decode_1"), COMMAND, PROMPT)
            assert [output.token_ids async for output in elsewhere] == [(1,)]
            assert triton.num_streams == 2

    asyncio.run(scene())


def test_a_stream_that_nobody_uses_is_closed_and_the_next_request_opens_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_stream, "_IDLE_S", 0.02)

    async def scene() -> None:
        async with open_triton(said([1], [-0.5])) as (triton, _), open_client() as client:
            await collect(client, triton)
            await until(lambda: triton.num_open == 0, "the end of the idle stream")
            assert triton.num_cancelled == 0
            assert [output.token_ids for output in await collect(client, triton)] == [(1,)]
            assert triton.num_streams == 2

    asyncio.run(scene())


def test_a_stream_stays_open_while_a_request_on_it_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_stream, "_IDLE_S", 0.01)

    async def scene() -> None:
        async with open_triton(said([1], [-0.5]), stays_open=True) as (triton, _), open_client() as client:
            triton.cancel_answer = response(event=encode_message(STATUS))
            outputs = aiter_of(WorkerRequest(client, address(triton), COMMAND, PROMPT))
            await outputs.__anext__()
            for number in range(3):
                passing = COMMAND.model_copy(update={"request_id": f"passing{number}"})
                await WorkerRequest(client, address(triton), passing, PROMPT).close()
            assert triton.num_streams == 1
            triton.may_end.set()
            assert [output async for output in outputs] == []

    asyncio.run(scene())


def test_a_client_can_be_used_again_after_closing() -> None:
    async def scene() -> None:
        async with open_triton(said([1], [-0.5])) as (triton, _), open_client() as client:
            await collect(client, triton)
            await client.close()
            assert [output.token_ids for output in await collect(client, triton)] == [(1,)]

    asyncio.run(scene())


def test_a_stream_with_an_abandoned_request_leaves_the_others_cancellable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with open_triton(said([1], [-0.5]), stays_open=True) as (triton, _), open_client() as client:
            triton.cancel_answer = response(event=encode_message(STATUS))
            commands = [COMMAND.model_copy(update={"request_id": name}) for name in ("deaf", "other")]
            deaf, other = (WorkerRequest(client, address(triton), command, PROMPT) for command in commands)
            await until(lambda: len(triton.requests) == 2, "the requests")
            with monkeypatch.context() as impatient:
                impatient.setattr(workers, "_CANCEL_TIMEOUT_S", 0.02)
                impatient.setattr(workers, "_DRAIN_TIMEOUT_S", 0.02)
                triton.heeds_cancel = False
                await deaf.close()
            triton.heeds_cancel = True
            await other.close()
            assert triton.cancelled_ids == {"other"}
            assert triton.num_streams == 2, "the cancellation went over a stream of its own"
            await until(lambda: triton.num_cancelled == 1, "the end of the call that was given up")

    asyncio.run(scene())


def test_a_server_that_nobody_asks_any_more_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_UNUSED_S", 0.02)
    monkeypatch.setattr(shared_stream, "_IDLE_S", 0.01)

    async def scene() -> None:
        async with open_triton(said([1], [-0.5]), stays_open=True) as (triton, _), open_client() as client:
            request = WorkerRequest(client, address(triton), COMMAND, PROMPT)
            await until(lambda: bool(triton.requests), "the request")
            for number in range(3):
                nowhere = WorkerAddress(f"127.0.0.1:{pick_free('127.0.0.1')}", f"decode_{number}")
                with pytest.raises(WorkerLost):
                    _ = [output async for output in WorkerRequest(client, nowhere, COMMAND, PROMPT)]
            await until(lambda: client.num_channels == 1, "the end of the channels that are not used")
            assert not request.stream.has_ended
            triton.may_end.set()
            assert [output.token_ids async for output in request] == [(1,)]
            await until(lambda: client.num_channels == 0, "the end of the last channel")
            assert [output.token_ids for output in await collect(client, triton)] == [(1,)]

    asyncio.run(scene())
