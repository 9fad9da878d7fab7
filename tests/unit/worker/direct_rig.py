"""Routers of a worker's own socket: a whole client, and one that says what a test wants, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import numpy as np
import numpy.typing as npt
from worker_rig import PROMPT, WorkerRig, generate_command

from kelp.client.base import Receive, WorkerAddress, WorkerStream
from kelp.client.direct.dialling import Dialling
from kelp.client.direct.frames import FrameReader
from kelp.client.direct.sockets import parse_endpoint
from kelp.client.direct.wire import (
    MAX_WORKER_FRAME_BYTES,
    PROTOCOL_VERSION,
    Hello,
    Output,
    Outputs,
    Refusal,
    RouterFrame,
    Start,
    Welcome,
    WorkerFrame,
    decode_worker_frame,
    encode_frame,
)
from kelp.client.workers import ShortestWay
from kelp.core.messages import DrainCommand, GenerateCommand, WorkerStatus
from kelp.core.peer_auth import PeerToken
from kelp.core.types import Role
from kelp.core.wire import encode_message
from support.waiting import until
from support.worker_outputs import WorkerRequest


class NoTriton:
    """A `WorkerClient` that must not be needed."""

    def generate(
        self, address: WorkerAddress, command: GenerateCommand, prompt: npt.NDArray[np.int32], receive: Receive
    ) -> WorkerStream:
        raise AssertionError("a request went through Triton")

    async def control(self, address: WorkerAddress, command: DrainCommand | None) -> WorkerStatus:
        raise AssertionError("a command went through Triton")

    def has_gone(self, address: WorkerAddress) -> bool:
        return False

    async def close(self) -> None:
        pass


class DirectRouter:
    """A router's client, connected."""

    def __init__(self, rig: WorkerRig, dialling: Dialling) -> None:
        self._rig = rig
        self.dialling = dialling
        self.client = ShortestWay(dialling, NoTriton())

    async def ask(self, role: Role = Role.AGGREGATED, **fields: object) -> WorkerRequest:
        """Start a request and wait until the executor has it."""
        num_requests = len(self._rig.executor.requests)
        command = generate_command(role, None, **fields)
        request = WorkerRequest(self.client, self._rig.address, command, PROMPT)
        await until(lambda: len(self._rig.executor.requests) > num_requests, "submission")
        return request


@contextlib.asynccontextmanager
async def open_direct_router(rig: WorkerRig, token: PeerToken | None = None) -> AsyncIterator[DirectRouter]:
    dialling = Dialling(token)
    await until(lambda: dialling.connection(rig.address) is not None, "the connection")
    router = DirectRouter(rig, dialling)
    try:
        yield router
    finally:
        await router.client.close()


class RawRouter:
    """Sends frames and bytes, and reads what comes back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self._frames = FrameReader("worker", MAX_WORKER_FRAME_BYTES)
        self._arrived: list[bytes] = []

    def send(self, *frames: RouterFrame) -> None:
        self.writer.write(b"".join(bytes(encode_frame(frame)) for frame in frames))

    async def next_frame(self) -> WorkerFrame:
        """The next frame; EOFError at the end of the connection."""
        return decode_worker_frame(await self.next_raw(), "worker")

    async def next_raw(self) -> bytes:
        """What is in the next frame."""
        while not self._arrived:
            data = await asyncio.wait_for(self._reader.read(65536), 10.0)
            if not data:
                raise EOFError
            self._arrived += self._frames.feed(data)
        return self._arrived.pop(0)

    async def outputs(self) -> tuple[Output, ...]:
        frame = await self.next_frame()
        assert isinstance(frame, Outputs), frame
        return frame.items

    async def refusal(self) -> str:
        """Why the worker ends the connection, once it has."""
        frame = await self.next_frame()
        while not isinstance(frame, Refusal):
            frame = await self.next_frame()
        assert await asyncio.wait_for(self._reader.read(), 10.0) == b"", "the connection stays open"
        return frame.error


def hello(rig: WorkerRig, **changes: object) -> Hello:
    address = rig.address
    fields = {"version": PROTOCOL_VERSION, "worker_id": address.worker_id, "epoch": address.epoch, **changes}
    return Hello(**fields)  # type: ignore[arg-type]


def start(number: int, **fields: object) -> Start:
    command = generate_command(Role.AGGREGATED, None, **{"request_id": f"r{number}", **fields})
    return Start(number, encode_message(command), PROMPT.tobytes())


@contextlib.asynccontextmanager
async def open_raw_router(
    rig: WorkerRig, is_welcome: bool = True, receive_buffer_bytes: int = 0
) -> AsyncIterator[RawRouter]:
    """A connection; `receive_buffer_bytes` makes it stall early."""
    host, port = parse_endpoint(rig.address.direct_endpoint)
    own = socket.socket()
    if receive_buffer_bytes:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    own.setblocking(False)
    await asyncio.get_running_loop().sock_connect(own, (host, port))
    reader, writer = await asyncio.open_connection(sock=own, limit=1024)
    router = RawRouter(reader, writer)
    try:
        if is_welcome:
            router.send(hello(rig))
            assert await router.next_frame() == Welcome(PROTOCOL_VERSION)
        yield router
    finally:
        writer.transport.abort()
