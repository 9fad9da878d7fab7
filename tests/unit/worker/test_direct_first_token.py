"""The first tokens of a lone request do not wait for the worker's loop, and never overtake what is ahead of them."""

from __future__ import annotations

import asyncio
import select
import socket

import pytest
from direct_rig import RawRouter, open_direct_router, open_raw_router, start
from worker_rig import completed, open_worker, token

from kelp.client.base import WorkerOutput
from kelp.core.errors import InternalError
from kelp.executor.base import Tokens
from kelp.worker.channel import StreamItem
from kelp.worker.direct import outgoing
from kelp.worker.stream import RequestStream
from support.waiting import until


def _has_something_to_read(router: RawRouter, wait_s: float = 0.0) -> bool:
    """Without letting the loop run."""
    return bool(select.select([router.writer.get_extra_info("socket").fileno()], [], [], wait_s)[0])


def test_the_first_tokens_of_a_lone_request_leave_before_the_loop_runs_again() -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_raw_router(rig) as router:
            router.send(start(0))
            await until(lambda: len(rig.executor.requests) == 1, "submission")
            rig.executor.requests[0].sink(token(1))
            assert _has_something_to_read(router, wait_s=10.0)
            (first,) = await router.outputs()
            assert first.token_ids == (1,) and first.event
            rig.executor.requests[0].sink(token(2))
            assert not _has_something_to_read(router)
            rig.executor.requests[0].sink(completed())
            (last,) = await router.outputs()
            assert last.token_ids == (2,) and last.is_last

    asyncio.run(scene())


def test_first_tokens_of_several_requests_share_a_frame() -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_raw_router(rig) as router:
            router.send(start(0), start(1))
            await until(lambda: len(rig.executor.requests) == 2, "submission")
            for request in rig.executor.requests:
                request.sink(token(1))
            assert not _has_something_to_read(router)
            assert [output.number for output in await router.outputs()] == [0, 1]

    asyncio.run(scene())


def test_first_tokens_do_not_overtake_what_their_request_has_said_before() -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_raw_router(rig) as router:
            router.send(start(0))
            await until(lambda: len(rig.executor.requests) == 1, "submission")
            rig.executor.requests[0].sink(Tokens((), ()))
            rig.executor.requests[0].sink(token(1))
            assert not _has_something_to_read(router)
            (output,) = await router.outputs()
            assert output.token_ids == (1,)

    asyncio.run(scene())


@pytest.mark.parametrize("num_taken", [0, 3], ids=["nothing", "a part"])
def test_what_the_socket_does_not_take_at_once_follows_whole_and_in_order(
    num_taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_little(connection: socket.socket, frame: bytes) -> int:
        return connection.send(frame[:num_taken]) if num_taken else 0

    monkeypatch.setattr(outgoing, "_sent", send_little)

    async def scene() -> None:
        async with open_worker() as rig, open_raw_router(rig) as router:
            router.send(start(0))
            await until(lambda: len(rig.executor.requests) == 1, "submission")
            for item in (token(1), token(2), completed()):
                rig.executor.requests[0].sink(item)
            outputs = [*await router.outputs(), *await router.outputs()]
            assert [output.token_ids for output in outputs] == [(1,), (2,)]
            assert outputs[-1].is_last

    asyncio.run(scene())


def test_a_lone_request_whose_first_tokens_cannot_be_put_together_fails_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stumble(stream: RequestStream, items: list[StreamItem]) -> WorkerOutput:
        raise ValueError("thirteen")

    monkeypatch.setattr(RequestStream, "_merge", stumble)

    async def scene() -> None:
        async with open_worker() as rig, open_direct_router(rig) as router:
            request = await router.ask()
            await asyncio.to_thread(rig.executor.requests[0].sink, token(13))
            with pytest.raises(InternalError, match="ValueError: thirteen"):
                await anext(request)

    asyncio.run(scene())


def test_first_tokens_that_come_after_the_router_has_gone_are_dropped() -> None:
    async def scene() -> None:
        async with open_worker() as rig:
            async with open_raw_router(rig) as router:
                router.send(start(0))
                await until(lambda: len(rig.executor.requests) == 1, "submission")
            await until(lambda: rig.service.direct.num_connections == 0, "the end of the connection")
            rig.executor.requests[0].sink(token(1))
            assert rig.service.direct.num_held == 0

    asyncio.run(scene())
