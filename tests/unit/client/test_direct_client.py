"""The router's end of a direct channel: when it is used, and every way it ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import numpy as np
import numpy.typing as npt
import pytest

from kelp.client.base import Receive, WorkerAddress, WorkerOutput
from kelp.client.direct import dialling, streams
from kelp.client.direct.dialling import Dialling
from kelp.client.direct.frames import FrameReader
from kelp.client.direct.sockets import format_endpoint, parse_endpoint
from kelp.client.direct.wire import (
    MAX_ROUTER_FRAME_BYTES,
    MAX_WORKER_FRAME_BYTES,
    Cancel,
    Control,
    Hello,
    Output,
    Outputs,
    Refusal,
    RouterFrame,
    Start,
    Welcome,
    WorkerFrame,
    decode_router_frame,
    encode_frame,
)
from kelp.client.workers import ShortestWay
from kelp.core.errors import CapacityError, KelpError, ProtocolError, WorkerDied, WorkerLost
from kelp.core.messages import DrainCommand, Finished, GenerateCommand, SamplingParams, WorkerStatus
from kelp.core.types import FinishReason, Role
from kelp.core.wire import encode_message
from support.waiting import until
from support.worker_outputs import WorkerRequest

PROMPT = np.array([5, 6, 7], dtype=np.int32)
COMMAND = GenerateCommand(
    request_id="r", role=Role.AGGREGATED, sampling=SamplingParams(max_tokens=3), seed_hash_hex="0" * 32
)
FINISHED = encode_message(Finished(finish_reason=FinishReason.STOP))
STATUS = WorkerStatus(
    worker="w", epoch="e", role=Role.DECODE, state="ready", num_running=1, num_waiting=0, num_blocks=4,
    num_free_blocks=3, num_cached_blocks=0, num_leases=0,
)  # fmt: skip


class FakeTriton:
    """A `WorkerClient` that notes what comes its way and never answers."""

    has_ended = True

    def __init__(self) -> None:
        self.commands: list[GenerateCommand] = []
        self.is_closed = False

    def generate(
        self, address: WorkerAddress, command: GenerateCommand, prompt: npt.NDArray[np.int32], receive: Receive
    ) -> FakeTriton:
        self.commands.append(command)
        return self

    async def control(self, address: WorkerAddress, command: DrainCommand | None) -> WorkerStatus:
        return STATUS

    def has_gone(self, address: WorkerAddress) -> bool:
        return False

    async def close(self) -> None:
        self.is_closed = True


class PlayedWorker:
    """Listens and says what a test wants."""

    def __init__(self) -> None:
        self.frames: list[RouterFrame] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.answer: WorkerFrame | None = Welcome(1)
        self.num_connections = self.num_ended = 0
        self.endpoint = ""

    @property
    def address(self) -> WorkerAddress:
        return WorkerAddress("host:1", "decode", self.endpoint, "epoch")

    def say(self, *frames: WorkerFrame) -> None:
        self.writers[-1].write(b"".join(bytes(encode_frame(frame)) for frame in frames))

    def tell(self, *outputs: Output) -> None:
        self.say(Outputs(outputs))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.writers.append(writer)
        frames = FrameReader("router", MAX_ROUTER_FRAME_BYTES)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                for raw in frames.feed(data):
                    frame = decode_router_frame(raw, "router")
                    if isinstance(frame, Hello) and self.answer is not None:
                        self.say(self.answer)
                    self.frames.append(frame)
        writer.transport.abort()
        self.num_ended += 1


class Scene:
    """A played worker and a client of it."""

    def __init__(self, worker: PlayedWorker, server: asyncio.Server) -> None:
        self.worker = worker
        self.server = server
        self.dialling = Dialling()
        self.triton = FakeTriton()
        self.client = ShortestWay(self.dialling, self.triton)

    async def connected(self) -> None:
        await until(lambda: self.dialling.connection(self.worker.address) is not None, "the connection")

    async def ask(self, request_id: str = "r") -> WorkerRequest:
        command = COMMAND.model_copy(update={"request_id": request_id})
        num_frames = len(self.worker.frames)
        request = WorkerRequest(self.client, self.worker.address, command, PROMPT)
        await until(lambda: len(self.worker.frames) > num_frames, "the start")
        return request


@contextlib.asynccontextmanager
async def open_scene(is_connected: bool = True) -> AsyncIterator[Scene]:
    worker = PlayedWorker()
    server = await asyncio.start_server(worker.serve, "127.0.0.1", 0)
    worker.endpoint = format_endpoint(*server.sockets[0].getsockname()[:2])
    scene = Scene(worker, server)
    try:
        if is_connected:
            await scene.connected()
        yield scene
    finally:
        await scene.client.close()
        server.close()
        await until(lambda: worker.num_ended == worker.num_connections, "the end of all connections")


def test_the_first_request_does_not_wait_for_the_connection_and_later_ones_use_it() -> None:
    async def story() -> None:
        async with open_scene(is_connected=False) as scene:
            WorkerRequest(scene.client, scene.worker.address, COMMAND, PROMPT)
            assert scene.triton.commands == [COMMAND]
            await scene.connected()
            await scene.ask("second")
            assert len(scene.triton.commands) == 1
            hello, start = scene.worker.frames
            assert hello == Hello(1, "host:1/decode", "epoch")
            assert isinstance(start, Start)
            assert GenerateCommand.model_validate_json(start.command).request_id == "second"
            assert list(np.frombuffer(start.prompt, dtype="<i4")) == [5, 6, 7]
            assert scene.worker.num_connections == 1

    asyncio.run(story())


def test_small_frames_are_sent_at_once() -> None:
    async def story() -> None:
        async with open_scene() as scene:
            connection = scene.dialling.connection(scene.worker.address)
            assert connection is not None and connection._transport is not None
            own = connection._transport.get_extra_info("socket")
            assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    asyncio.run(story())


def test_a_worker_that_does_not_listen_is_reached_through_triton() -> None:
    async def story() -> None:
        async with open_scene() as scene:
            WorkerRequest(scene.client, WorkerAddress("host:1", "decode"), COMMAND, PROMPT)
            assert await scene.client.control(WorkerAddress("host:1", "decode"), None) == STATUS
            assert len(scene.triton.commands) == 1 and len(scene.worker.frames) == 1

    asyncio.run(story())


def test_the_first_request_to_an_expected_worker_goes_the_short_way() -> None:
    async def story() -> None:
        async with open_scene(is_connected=False) as scene:
            for _ in range(2):
                scene.client.expect([scene.worker.address, WorkerAddress("host:1", "without a socket")])
            await until(lambda: bool(scene.dialling._connections), "the connection")
            WorkerRequest(scene.client, scene.worker.address, COMMAND, PROMPT)
            await until(lambda: any(isinstance(frame, Start) for frame in scene.worker.frames), "the request")
            assert not scene.triton.commands

    asyncio.run(story())


@pytest.mark.parametrize("endpoint", ["127.0.0.1:1", "nonsense", "127.0.0.1:99999", ":5"])
def test_a_socket_that_cannot_be_reached_is_left_in_peace_for_a_while(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialling, "_REST_S", 0.05)

    async def story() -> None:
        async with open_scene(is_connected=False) as scene:
            address = WorkerAddress("host:1", "decode", endpoint, "epoch")
            for _ in range(3):
                WorkerRequest(scene.client, address, COMMAND, PROMPT)
                await asyncio.sleep(0)
            assert len(scene.triton.commands) == 3
            await until(lambda: bool(scene.dialling._resting), "the failure")
            await until(lambda: not scene.dialling._resting, "the end of the rest")

    asyncio.run(story())


def test_a_refused_hello_sends_requests_through_triton() -> None:
    async def story() -> None:
        async with open_scene(is_connected=False) as scene:
            scene.worker.answer = Refusal(str(WorkerLost("another incarnation is meant")))
            WorkerRequest(scene.client, scene.worker.address, COMMAND, PROMPT)
            await until(lambda: bool(scene.dialling._resting), "the refusal")
            WorkerRequest(scene.client, scene.worker.address, COMMAND, PROMPT)
            assert len(scene.triton.commands) == 2

    asyncio.run(story())


def test_a_worker_that_never_welcomes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialling, "_DIAL_TIMEOUT_S", 0.05)

    async def story() -> None:
        async with open_scene(is_connected=False) as scene:
            scene.worker.answer = None
            WorkerRequest(scene.client, scene.worker.address, COMMAND, PROMPT)
            await until(lambda: bool(scene.dialling._resting), "giving up")

    asyncio.run(story())


def test_outputs_reach_the_requests_they_name() -> None:
    async def story() -> None:
        async with open_scene() as scene:
            first, second = await scene.ask("first"), await scene.ask("second")
            scene.worker.tell(Output(1, (4,), (-0.5,)), Output(0, (1, 2), (-1.0, -2.0)), Output(0, (), ()))
            scene.worker.tell(Output(0, (3,), (-3.0,), FINISHED, "", True))
            assert [output.token_ids async for output in first] == [(1, 2), (), (3,)]
            assert await anext(second) == WorkerOutput((4,), (-0.5,), None)
            assert first.stream.has_ended and not second.stream.has_ended
            await first.close()
            assert not any(isinstance(frame, Cancel) for frame in scene.worker.frames)

    asyncio.run(story())


def test_a_typed_error_ends_its_request_after_its_tokens_and_no_other() -> None:
    async def story() -> None:
        async with open_scene() as scene:
            first, second = await scene.ask("first"), await scene.ask("second")
            scene.worker.tell(Output(0, (1,), (-1.0,), b"", str(CapacityError("full")), True), Output(1, (), ()))
            assert (await anext(first)).token_ids == (1,)
            with pytest.raises(CapacityError, match="full"):
                await anext(first)
            assert (await anext(second)).token_ids == ()

    asyncio.run(story())


def test_closing_a_request_cancels_it_and_waits_for_its_end() -> None:
    async def story() -> None:
        async with open_scene() as scene:
            request = await scene.ask()
            closing = asyncio.ensure_future(request.close())
            await until(lambda: scene.worker.frames[-1] == Cancel(0), "the cancellation")
            assert not closing.done()
            scene.worker.tell(Output(0, (), (), b"", "[KELP_CANCELLED] as asked", True))
            await closing
            await request.close()
            assert scene.worker.frames.count(Cancel(0)) == 1

    asyncio.run(story())


def test_a_worker_that_does_not_end_a_request_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_DRAIN_TIMEOUT_S", 0.02)

    async def story() -> None:
        async with open_scene() as scene:
            request, other = await scene.ask(), await scene.ask("other")
            await request.close()
            scene.worker.tell(Output(0, (9,), (-9.0,)), Output(1, (1,), (-1.0,)))
            assert (await anext(other)).token_ids == (1,), "what comes late does no harm"

    asyncio.run(story())


def test_a_connection_that_is_cut_loses_all_its_requests_at_once() -> None:
    async def story() -> None:
        async with open_scene() as scene:
            requests = [await scene.ask(str(number)) for number in range(3)]
            asking = asyncio.ensure_future(scene.client.control(scene.worker.address, None))
            await until(lambda: isinstance(scene.worker.frames[-1], Control), "the control command")
            scene.worker.tell(Output(0, (1,), (-1.0,)))
            assert (await anext(requests[0])).token_ids == (1,)
            scene.worker.writers[-1].transport.abort()
            for request in requests:
                with pytest.raises(WorkerDied, match="host:1/decode at 127.* connection broke"):
                    await anext(request)
                assert request.stream.has_ended
                await request.close()
            with pytest.raises(WorkerLost):
                await asking
            await until(lambda: scene.worker.num_connections == 2, "another connection")
            await scene.connected()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("reason", "has_died"),
    [
        (None, True),
        (ConnectionResetError(), True),
        (BrokenPipeError(), True),
        (TimeoutError(), False),
        (OSError(), False),
    ],
)
def test_only_a_connection_that_somebody_ended_tells_of_a_death(reason: Exception | None, has_died: bool) -> None:
    async def story() -> None:
        async with open_scene() as scene:
            request = await scene.ask()
            connection = scene.dialling.connection(scene.worker.address)
            assert connection is not None
            connection.connection_lost(reason)
            with pytest.raises(WorkerLost) as raised:
                await anext(request)
            assert isinstance(raised.value, WorkerDied) is has_died

    asyncio.run(story())


def test_a_worker_that_breaks_off_once_more_while_it_dies_is_known_as_gone_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dialling, "_REST_S", 0.01)

    async def story() -> None:
        async with open_scene() as scene:
            scene.worker.answer = Refusal(str(WorkerLost("going")))
            scene.worker.writers[-1].transport.abort()
            await until(lambda: scene.worker.num_connections == 2, "the second attempt")
            scene.server.close()

            def is_lost() -> bool:
                try:
                    return scene.dialling.connection(scene.worker.address) is not None
                except WorkerLost:
                    return True

            await until(is_lost, "the worker to be known as gone")
            assert scene.client.has_gone(scene.worker.address)

    asyncio.run(story())


def test_a_worker_whose_host_says_that_nobody_listens_any_more_is_lost_without_asking_triton() -> None:
    async def story() -> None:
        async with open_scene() as scene:
            scene.server.close()
            scene.worker.writers[-1].transport.abort()
            assert not scene.client.has_gone(scene.worker.address)
            await until(lambda: scene.client.has_gone(scene.worker.address), "the worker to be known as gone")
            with pytest.raises(WorkerDied, match="no longer listens"):
                WorkerRequest(scene.client, scene.worker.address, COMMAND, PROMPT)
            assert scene.triton.commands == []

    asyncio.run(story())


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (Outputs((Output(0, (1, 2), (-0.5,)),)), "2 tokens with 1 log_probs"),
        (Outputs((Output(5, (1,), (-0.5,)),)), "request 5, which was never started"),
        (Outputs((Output(0, (), (), b"{}"),)), "kind|discriminator|tag"),
        (Outputs((Output(0, (), (), FINISHED),)), "ends with"),
        (Outputs((Output(0, (), (), b"", "", True),)), "ends with"),
        (Welcome(1), "welcome"),
        (Hello(1, "a", "b"), "frame of"),
        (Refusal(str(ProtocolError("number 3 given"))), "number 3 given"),
    ],
    ids=["uneven", "unknown number", "no event", "finished too early", "no end", "again", "a router", "refusal"],
)
def test_a_worker_that_talks_nonsense_ends_the_connection_by_name(said: WorkerFrame, what: str) -> None:
    async def story() -> None:
        async with open_scene() as scene:
            requests = [await scene.ask("first"), await scene.ask("second")]
            scene.worker.say(said)
            for request in requests:
                with pytest.raises(ProtocolError, match=what):
                    await anext(request)

    asyncio.run(story())


def test_a_frame_that_is_too_long_ends_the_connection() -> None:
    async def story() -> None:
        async with open_scene() as scene:
            request = await scene.ask()
            scene.worker.writers[-1].write((MAX_WORKER_FRAME_BYTES + 1).to_bytes(4, "little"))
            with pytest.raises(ProtocolError, match=f"the limit is {MAX_WORKER_FRAME_BYTES}"):
                await anext(request)

    asyncio.run(story())


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Output(0, (), (), b"", str(CapacityError("no")), True), CapacityError),
        (Output(0, (), (), b"{}", "", True), ProtocolError),
    ],
    ids=["typed error", "garbage"],
)
def test_control_does_not_take_anything_for_a_status(answer: Output, error: type[KelpError]) -> None:
    async def story() -> None:
        async with open_scene() as scene:
            asking = asyncio.ensure_future(scene.client.control(scene.worker.address, DrainCommand(timeout_s=5.0)))
            await until(lambda: isinstance(scene.worker.frames[-1], Control), "the command")
            scene.worker.tell(answer)
            with pytest.raises(error):
                await asking

    asyncio.run(story())


def test_control_returns_the_status() -> None:
    async def story() -> None:
        async with open_scene() as scene:
            asking = asyncio.ensure_future(scene.client.control(scene.worker.address, None))
            await until(lambda: isinstance(scene.worker.frames[-1], Control), "the command")
            scene.worker.tell(Output(0, (), (), encode_message(STATUS), "", True))
            assert await asking == STATUS

    asyncio.run(story())


def test_closing_the_client_ends_connections_and_requests() -> None:
    async def story() -> None:
        async with open_scene() as scene:
            request = await scene.ask()
            await scene.client.close()
            assert scene.triton.is_closed
            with pytest.raises(WorkerLost):
                await anext(request)
            await asyncio.sleep(0.01)
            assert scene.worker.num_connections == 1, "a closed client dials nobody"

    asyncio.run(story())


@pytest.mark.parametrize("endpoint", ["127.0.0.1:80", "[::1]:80", "worker-3.example:80"])
def test_endpoints_read_as_they_were_written(endpoint: str) -> None:
    assert format_endpoint(*parse_endpoint(endpoint)) == endpoint
