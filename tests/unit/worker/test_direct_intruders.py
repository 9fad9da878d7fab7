"""What a worker's own socket does with peers that are no routers, mean somebody else, or do not listen."""

from __future__ import annotations

import asyncio
import struct

import pytest
from direct_rig import hello, open_direct_router, open_raw_router, start
from worker_rig import WorkerRig, completed, open_worker, token

from kelp.client.direct.wire import MAX_HELLO_BYTES, MAX_ROUTER_FRAME_BYTES, Cancel, Welcome, encode_frame
from kelp.core.config_replicas import DirectConfig
from kelp.executor.base import Tokens
from kelp.worker.direct import connection, outgoing, server
from support.waiting import until


async def serves_on(rig: WorkerRig) -> None:
    async with open_direct_router(rig) as router:
        request = await router.ask()
        rig.executor.emit(token(1), completed())
        assert [output async for output in request][0].token_ids == (1,)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"epoch": "an earlier one"}, "epoch of an earlier one|an earlier one is meant"),
        ({"worker_id": "host:1/another"}, "host:1/another of epoch"),
        ({"version": 2}, "version 2"),
    ],
    ids=["epoch", "worker", "version"],
)
def test_a_router_that_means_another_worker_is_refused_and_told_why(changes: dict[str, object], what: str) -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_raw_router(rig, is_welcome=False) as router:
            router.send(hello(rig, **changes))
            error = await router.refusal()
            assert any(part in error for part in what.split("|")), error
            assert rig.executor.requests == []
            await serves_on(rig)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", f"the limit is {MAX_HELLO_BYTES}"),
        (struct.pack("<I", MAX_HELLO_BYTES + 1), f"the limit is {MAX_HELLO_BYTES}"),
        (struct.pack("<I", 0), "frame of 0 bytes"),
        (struct.pack("<I", 3) + b"\x93\x00\x01", "frame of 3 bytes"),
        (bytes(encode_frame(start(0))), "start before hello"),
        (bytes(encode_frame(Cancel(0))), "cancel before hello"),
        (bytes(encode_frame(Welcome(1))), "frame of"),
    ],
    ids=["HTTP", "too long", "empty", "cut", "start", "cancel", "a worker"],
)
def test_a_peer_that_does_not_say_hello_is_refused(data: bytes, what: str) -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_raw_router(rig, is_welcome=False) as router:
            router.writer.write(data)
            assert what in await router.refusal()
            assert rig.executor.requests == []
            await serves_on(rig)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (struct.pack("<I", MAX_ROUTER_FRAME_BYTES + 1), "the limit is"),
        (struct.pack("<I", 4) + b"junk", "frame of 4 bytes"),
        (bytes(encode_frame(start(0))), "number 0 given, 0 was the last"),
        (bytes(encode_frame(Cancel(7))), "request 7 was never started"),
    ],
    ids=["too long", "junk", "a number again", "an unknown number"],
)
def test_a_router_that_breaks_the_protocol_is_told_and_its_requests_are_aborted(data: bytes, what: str) -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_raw_router(rig) as router:
            router.send(start(0))
            await until(lambda: len(rig.executor.requests) == 1, "submission")
            router.writer.write(data)
            assert what in await router.refusal()
            await until(lambda: rig.executor.calls == [("abort", 0)], "the abort")
            assert rig.service.direct.num_requests == 0

    asyncio.run(scene())


def test_a_router_may_say_hello_once() -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_raw_router(rig) as router:
            router.send(hello(rig))
            assert "once" in await router.refusal()

    asyncio.run(scene())


def test_a_peer_that_says_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HELLO_TIMEOUT_S", 0.02)

    async def scene() -> None:
        async with open_worker() as rig, open_raw_router(rig, is_welcome=False) as router:
            with pytest.raises((EOFError, ConnectionError)):
                await router.next_frame()

    asyncio.run(scene())


def test_more_routers_than_a_worker_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_MAX_CONNECTIONS", 1)

    async def scene() -> None:
        async with open_worker() as rig:
            async with open_raw_router(rig), open_raw_router(rig, is_welcome=False) as further:
                assert "KELP_OVERLOADED" in await further.refusal()
            await until(lambda: rig.service.direct.num_connections == 0, "both to have gone")
            await serves_on(rig)

    asyncio.run(scene())


def test_more_requests_than_a_router_may_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_MAX_REQUESTS", 1)

    async def scene() -> None:
        async with open_worker() as rig, open_raw_router(rig) as router:
            router.send(start(0), start(1))
            (refused,) = await router.outputs()
            assert (refused.number, refused.is_last) == (1, True) and "KELP_OVERLOADED" in refused.error
            await until(lambda: len(rig.executor.requests) == 1, "the first")

    asyncio.run(scene())


@pytest.mark.parametrize("limit", ["time", "number"])
def test_a_router_that_does_not_read_is_cut_off_and_its_requests_are_aborted(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing, "_MAX_HELD_ITEMS", 50)
    stall_timeout_s = 0.05 if limit == "time" else 60.0

    async def scene() -> None:
        direct = DirectConfig(stall_timeout_s=stall_timeout_s)
        async with (
            open_worker(direct=direct) as rig,
            open_raw_router(rig, receive_buffer_bytes=4096) as router,
        ):
            router.send(start(0))
            await until(lambda: len(rig.executor.requests) == 1, "submission")
            sink = rig.executor.requests[0].sink
            num_said = 0
            while not rig.executor.calls:
                if limit == "number" or not rig.service.direct.num_held:
                    sink(Tokens((7,) * 1024, (-0.5,) * 1024))
                    num_said += 1
                await asyncio.sleep(0)
                assert rig.service.direct.num_held <= 60, "memory grows although nobody reads"
                assert num_said < 5000, "nobody was cut off"
            assert rig.executor.calls == [("abort", 0)]
            await until(lambda: rig.service.direct.num_connections == 0, "the end of the connection")
            sink(token(1))
            assert rig.service.direct.num_held == 0
            await serves_on(rig)

    asyncio.run(scene())


def test_a_router_that_reads_again_in_time_gets_everything_in_order() -> None:
    async def scene() -> None:
        async with open_worker() as rig, open_raw_router(rig, receive_buffer_bytes=4096) as router:
            router.send(start(0))
            await until(lambda: len(rig.executor.requests) == 1, "submission")
            num_said = 0
            while not rig.service.direct.num_held:
                rig.executor.requests[0].sink(Tokens((num_said,) * 1024, (-0.5,) * 1024))
                num_said += 1
                await asyncio.sleep(0)
            rig.executor.requests[0].sink(completed())
            arrived: list[int] = []
            is_over = False
            while not is_over:
                (output,) = await router.outputs()
                arrived += output.token_ids
                is_over = output.is_last
            assert arrived == [step for step in range(num_said) for _ in range(1024)]
            assert rig.service.direct.num_requests == 0

    asyncio.run(scene())
