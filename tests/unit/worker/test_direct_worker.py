"""A worker's own socket: requests over it are served like any, and a router that goes takes its requests along."""

from __future__ import annotations

import asyncio

import pytest
from direct_rig import open_direct_router, open_raw_router, start
from worker_rig import PROMPT, completed, generate_command, open_worker, token

from kelp.client.base import WorkerOutput
from kelp.client.direct.wire import Cancel, Control, Start
from kelp.core.config_replicas import DirectConfig
from kelp.core.errors import CapacityError, DeadlineExceeded, InternalError, KelpError, RequestCancelled, WorkerLost
from kelp.core.messages import DrainCommand, Finished, Progress, RequestUsage, StatusCommand
from kelp.core.types import FinishReason, Role
from kelp.core.wire import encode_message
from kelp.executor.base import Admitted, Failed, Tokens
from kelp.worker.channel import StreamItem
from kelp.worker.stream import RequestStream
from support.waiting import until
from support.worker_outputs import WorkerRequest


def test_tokens_stream_and_the_last_output_says_how_it_ended() -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_direct_router(rig) as router:
            request = await router.ask(num_generated=3)
            (submitted,) = rig.executor.requests
            assert list(submitted.prompt) == list(PROMPT) and submitted.num_generated == 3
            rig.executor.emit(Admitted(RequestUsage(cached_tokens=4), 5), token(1))
            first = await anext(request)
            assert (first.token_ids, first.log_probs) == ((1,), (-0.5,))
            assert isinstance(first.event, Progress) and first.event.usage.cached_tokens == 4
            rig.executor.emit(Tokens((2, 3), (-1.0, -2.0)), completed(FinishReason.STOP))
            rest = [output async for output in request]
            assert [t for output in rest for t in output.token_ids] == [2, 3]
            finished = rest[-1].event
            assert isinstance(finished, Finished)
            assert (finished.finish_reason, finished.timings.first_scheduled_ns) == (FinishReason.STOP, 5)
            assert finished.timings.arrival_ns > 0
            assert request.stream.has_ended and request.num_ends == 1
            assert rig.service.direct.num_requests == 0

    asyncio.run(scene())


def test_all_that_requests_say_until_the_loop_runs_goes_out_in_one_frame() -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_raw_router(rig) as router:
            router.send(*(start(number) for number in range(3)))
            await until(lambda: len(rig.executor.requests) == 3, "submission")
            for step in range(2):
                for request in rig.executor.requests:
                    request.sink(token(step))
            outputs = await router.outputs()
            assert [(output.number, output.token_ids) for output in outputs] == [(n, (0, 1)) for n in range(3)]
            for request in rig.executor.requests:
                request.sink(completed())
            assert [output.is_last for output in await router.outputs()] == [True] * 3
            assert rig.service.direct.num_requests == 0

    asyncio.run(scene())


@pytest.mark.parametrize("num_said", [0, 1], ids=["waiting", "running"])
def test_closing_a_stream_aborts_its_request_and_no_other(num_said: int) -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_direct_router(rig) as router:
            staying = await router.ask(request_id="staying")
            leaving = await router.ask(request_id="leaving")
            for number in range(num_said):
                rig.executor.emit(token(number))
            await leaving.close()
            assert leaving.stream.has_ended
            assert rig.executor.calls == [("abort", 1)]
            with pytest.raises(RequestCancelled):
                _ = [output async for output in leaving]
            rig.executor.emit(token(2), completed(), number=0)
            assert [output.token_ids async for output in staying][0] == (2,)

    asyncio.run(scene())


def test_a_request_that_is_cancelled_with_the_same_breath_never_runs_on() -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_raw_router(rig) as router:
            router.send(start(0), Cancel(0), Cancel(0))
            (output,) = await router.outputs()
            assert output.is_last and "KELP_CANCELLED" in output.error
            assert rig.executor.calls in ([], [("abort", 0)])
            assert len(rig.executor.requests) == len(rig.executor.calls)
            router.send(Cancel(0), Control(1, encode_message(StatusCommand())))
            (status,) = await router.outputs()
            assert status.number == 1 and not status.error

    asyncio.run(scene())


def test_a_router_that_goes_takes_its_requests_along_and_no_others() -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_direct_router(rig) as staying:
            kept = await staying.ask(request_id="kept")
            async with open_raw_router(rig) as going:
                going.send(start(0), start(1))
                await until(lambda: len(rig.executor.requests) == 3, "submission")
                rig.executor.emit(token(1), number=1)
                await going.outputs()
            await until(lambda: len(rig.executor.calls) == 2, "the end of both")
            assert sorted(rig.executor.calls) == [("abort", 1), ("abort", 2)]
            rig.executor.emit(token(5), number=1)
            rig.executor.emit(token(2), completed(), number=0)
            assert (await anext(kept)).token_ids == (2,)
            await until(lambda: rig.service.direct.num_requests == 0, "the end of all")

    asyncio.run(scene())


@pytest.mark.parametrize("error", [DeadlineExceeded("late"), CapacityError("full")])
def test_what_the_executor_gives_up_fails_by_name_after_its_tokens(error: KelpError) -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_direct_router(rig) as router:
            request = await router.ask()
            rig.executor.emit(token(1), Failed(error))
            assert (await anext(request)).token_ids == (1,)
            with pytest.raises(type(error), match=error.text):
                await anext(request)
            assert rig.service.direct.num_requests == 0

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (Start(0, b"{}", PROMPT.tobytes()), "KELP_PROTOCOL"),
        (Start(0, b'{"op": "status"}', PROMPT.tobytes()), "generate expected"),
        (Start(0, encode_message(generate_command(Role.AGGREGATED, None)), b"abc"), "3 bytes"),
        (Start(0, encode_message(generate_command(Role.DECODE, None)), PROMPT.tobytes()), "rendezvous"),
        (Control(0, b'{"op": "cancel", "request_id": "r"}'), "drain or status expected"),
        (Control(0, b"\xff"), "command"),
    ],
    ids=["no operation", "status", "half a token", "no rendezvous", "cancel", "not UTF-8"],
)
def test_a_command_that_is_none_is_refused_by_field_and_the_connection_goes_on(
    broken: Start | Control, what: str
) -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_raw_router(rig) as router:
            router.send(broken)
            (output,) = await router.outputs()
            assert output.is_last and what in output.error
            router.send(start(1))
            await until(lambda: len(rig.executor.requests) == 1, "the next request")

    asyncio.run(scene())


def test_control_drains_and_tells_the_status() -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_direct_router(rig) as router:
            assert (await router.client.control(rig.address, None)).state == "ready"
            request = await router.ask()
            draining = asyncio.ensure_future(router.client.control(rig.address, DrainCommand(timeout_s=5.0)))
            await until(lambda: rig.registry.published[-1].state == "draining", "draining")
            refused = WorkerRequest(router.client, rig.address, generate_command(Role.AGGREGATED, None), PROMPT)
            with pytest.raises(WorkerLost, match="draining"):
                await anext(refused)
            rig.executor.emit(completed())
            assert (await draining).state == "draining"
            assert [output async for output in request]

    asyncio.run(scene())


def test_a_waiting_request_shows_that_the_worker_lives() -> None:
    async def scene() -> None:
        async with open_worker(idle_timeout_s=0.02) as rig, open_direct_router(rig) as router:
            request = await router.ask()
            for _ in range(3):
                output = await anext(request)
                assert (output.token_ids, output.event) == ((), None)

    asyncio.run(scene())


def test_stopping_a_worker_fails_its_requests_as_lost_and_ends_the_connection() -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_direct_router(rig) as router:
            request = await router.ask()
            await rig.service.stop()
            with pytest.raises(WorkerLost, match="is stopping"):
                await anext(request)
            await until(lambda: _is_gone(router, rig), "the worker to be known as gone")

    asyncio.run(scene())


def _is_gone(router: object, rig: object) -> bool:
    try:
        router.dialling.connection(rig.address)  # type: ignore[attr-defined]
    except WorkerLost:
        return True
    return False


def test_an_output_that_cannot_be_put_together_fails_its_request_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merge = RequestStream._merge

    def stumble(stream: RequestStream, items: list[StreamItem]) -> WorkerOutput:
        if items == [token(13)]:
            raise ValueError("thirteen")
        return merge(stream, items)

    monkeypatch.setattr(RequestStream, "_merge", stumble)

    async def scene() -> None:
        async with open_worker() as rig, open_direct_router(rig) as router:
            failing, other = await router.ask(request_id="failing"), await router.ask(request_id="other")
            rig.executor.requests[0].sink(token(13))
            rig.executor.requests[1].sink(token(1))
            with pytest.raises(InternalError, match="ValueError: thirteen"):
                await anext(failing)
            assert (await anext(other)).token_ids == (1,)
            await until(lambda: rig.executor.calls == [("abort", 0)], "the abort")

    asyncio.run(scene())


def test_a_worker_may_be_told_not_to_listen() -> None:
    async def scene() -> None:
        async with open_worker(direct=DirectConfig(enabled=False)) as rig:
            assert rig.registry.published[-1].direct_endpoint == ""

    asyncio.run(scene())
