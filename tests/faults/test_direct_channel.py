"""A worker's own socket under peers that die, lie, cut the line or stop reading: real processes, real sockets.

After each fault the worker holds nothing of it: no sequence, no block, no connection, no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from fault_scenes import QUESTION, require_server

from kelp.client.base import WorkerAddress
from kelp.client.direct.dialling import Dialling
from kelp.client.direct.frames import FrameReader
from kelp.client.direct.sockets import parse_endpoint
from kelp.client.direct.wire import (
    MAX_ROUTER_FRAME_BYTES,
    MAX_WORKER_FRAME_BYTES,
    PROTOCOL_VERSION,
    Hello,
    Refusal,
    Start,
    WorkerFrame,
    decode_worker_frame,
    encode_frame,
)
from kelp.client.grpc import GrpcWorkerClient
from kelp.client.workers import ShortestWay
from kelp.core.errors import WorkerLost
from kelp.core.messages import GenerateCommand, SamplingParams
from kelp.core.types import Role
from kelp.core.wire import encode_message
from support.serving import MODEL, KelpServer, clean_environment
from support.waiting import until, wait_until
from support.worker_outputs import WorkerRequest

EPOCH = "the epoch"
PROMPT = np.arange(1000, 1040, dtype=np.int32)


def command(max_tokens: int = 1500) -> GenerateCommand:
    return GenerateCommand(
        request_id=uuid.uuid4().hex,
        role=Role.AGGREGATED,
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        seed_hash_hex=uuid.uuid4().hex,
    )


class WorkerProcess:
    """See `direct_worker_process`."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("direct_worker_process.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), EPOCH, str(MODEL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        assert self.process.stdout is not None
        self.endpoint = self.process.stdout.readline().strip()
        assert self.endpoint, f"the worker ended with status {self.process.wait(10.0)}"

    @property
    def address(self) -> WorkerAddress:
        return WorkerAddress("127.0.0.1:1", "decode", self.endpoint, EPOCH)

    @property
    def num_connections(self) -> int:
        """Routers connected, as the kernel counts them."""
        port = parse_endpoint(self.endpoint)[1]
        open_now = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(one.laddr.port == port and one.status != psutil.CONN_LISTEN for one in open_now)

    @property
    def num_threads(self) -> int:
        return psutil.Process(self.process.pid).num_threads()

    def stop(self) -> None:
        self.process.communicate(timeout=30.0)


@contextlib.asynccontextmanager
async def open_client(worker: WorkerProcess) -> AsyncIterator[ShortestWay]:
    """A router's client, connected."""
    dialling = Dialling()
    client = ShortestWay(dialling, GrpcWorkerClient())
    try:
        await until(lambda: dialling.connection(worker.address) is not None, "the connection")
        yield client
    finally:
        await client.close()


async def wait_nothing_held(worker: WorkerProcess) -> None:
    """Ask the worker itself until it holds nothing of any request."""
    async with open_client(worker) as client:
        for _ in range(1000):
            status = await client.control(worker.address, None)
            is_idle = status.num_running == status.num_waiting == status.num_leases == 0
            if is_idle and status.num_free_blocks + status.num_cached_blocks == status.num_blocks:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"the worker still holds {status}")


async def check_answers(worker: WorkerProcess) -> None:
    async with open_client(worker) as client:
        request = WorkerRequest(client, worker.address, command(max_tokens=100), PROMPT)
        assert sum([len(output.token_ids) async for output in request]) == 100


_POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)


@pytest.fixture(scope="module")
def own_worker() -> Iterator[WorkerProcess]:
    require_server()
    worker = WorkerProcess()
    asyncio.run(check_answers(worker))
    yield worker
    worker.stop()
    assert worker.process.returncode == 0


@pytest.fixture
def worker(own_worker: WorkerProcess) -> Iterator[WorkerProcess]:
    """The worker; afterwards it answers as before and holds nothing of the fault."""
    num_threads = own_worker.num_threads
    yield own_worker
    asyncio.run(wait_nothing_held(own_worker))
    wait_until(lambda: own_worker.num_connections == 0, "the end of all connections")
    asyncio.run(check_answers(own_worker))
    # The loop's pool grows to its bound, whoever asks first.
    assert own_worker.num_threads <= num_threads + _POOL_THREADS


class Intruder:
    """A plain socket."""

    def __init__(self, worker: WorkerProcess, receive_buffer_bytes: int = 0) -> None:
        self.socket = socket.socket()
        if receive_buffer_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.socket.settimeout(20.0)
        self.socket.connect(parse_endpoint(worker.endpoint))
        self._frames = FrameReader("worker", MAX_WORKER_FRAME_BYTES)

    def say_hello(self, epoch: str = EPOCH) -> None:
        self.socket.sendall(encode_frame(Hello(PROTOCOL_VERSION, "127.0.0.1:1/decode", epoch)))

    def start(self, number: int) -> None:
        self.socket.sendall(encode_frame(Start(number, encode_message(command()), PROMPT.tobytes())))

    def frames(self) -> Iterator[WorkerFrame]:
        """What the worker says, until it closes the connection."""
        with contextlib.suppress(ConnectionError):
            while data := self.socket.recv(65536):
                for raw in self._frames.feed(data):
                    yield decode_worker_frame(raw, "worker")

    def reset(self) -> None:
        """Vanish without a word."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def last_words(intruder: Intruder) -> str:
    """Why the worker has ended the connection."""
    *_, last = intruder.frames()
    intruder.socket.close()
    assert isinstance(last, Refusal), last
    return last.error


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"GET /metrics HTTP/1.1\r\n\r\n", "frame of"),
        (b"\x00" * 64, "frame of 0 bytes"),
        (b"\xff" * 64, "the limit is"),
        (struct.pack("<I", 32) + b"\x91" * 32, "frame of 32 bytes"),
    ],
    ids=["HTTP", "zeros", "ones", "nested"],
)
def test_garbage_is_refused_by_name(worker: WorkerProcess, data: bytes, what: str) -> None:
    intruder = Intruder(worker)
    intruder.socket.sendall(data)
    assert what in last_words(intruder)


def test_garbage_in_the_middle_of_answers_ends_them(worker: WorkerProcess) -> None:
    intruder = Intruder(worker)
    intruder.say_hello()
    for number in range(4):
        intruder.start(number)
    intruder.socket.sendall(struct.pack("<I", 5) + b"\xc1junk")
    assert "frame of 5 bytes" in last_words(intruder)


def test_a_frame_beyond_the_limit_is_refused_before_it_is_taken(worker: WorkerProcess) -> None:
    resident = psutil.Process(worker.process.pid).memory_info().rss
    intruder = Intruder(worker)
    intruder.say_hello()
    next(intruder.frames())
    intruder.socket.sendall(struct.pack("<I", 2**32 - 1))
    assert f"the limit is {MAX_ROUTER_FRAME_BYTES}" in last_words(intruder)
    assert psutil.Process(worker.process.pid).memory_info().rss < resident + MAX_ROUTER_FRAME_BYTES


def test_a_router_that_means_an_earlier_incarnation_is_refused(worker: WorkerProcess) -> None:
    intruder = Intruder(worker)
    intruder.say_hello(epoch="an earlier one")
    error = last_words(intruder)
    assert "[KELP_WORKER_LOST]" in error and "an earlier one is meant" in error


@pytest.mark.parametrize("num_frames", [1, 3], ids=["before the first token", "in mid answer"])
def test_a_line_that_is_cut_aborts_the_requests_on_it(worker: WorkerProcess, num_frames: int) -> None:
    intruder = Intruder(worker)
    intruder.say_hello()
    for number in range(4):
        intruder.start(number)
    for _, _ in zip(range(num_frames), intruder.frames(), strict=False):
        pass
    intruder.reset()


def test_a_router_that_stops_reading_is_cut_off(worker: WorkerProcess) -> None:
    intruder = Intruder(worker, receive_buffer_bytes=4096)
    intruder.say_hello()
    wait_until(lambda: worker.num_connections == 1, "the connection")
    number = 0
    while worker.num_connections and number < 4000:
        with contextlib.suppress(ConnectionError):
            intruder.start(number)
        number += 1
    wait_until(lambda: worker.num_connections == 0, "being cut off", 30.0)
    intruder.socket.close()


def test_a_served_router_keeps_one_connection_to_each_worker_it_has_used(server: KelpServer) -> None:
    ports = {parse_endpoint(record.direct_endpoint)[1] for record in server.records().values()}
    for _ in range(3):
        server.ask(**QUESTION)
    router = psutil.Process(server.stub("llm").pid)

    def connected_ports() -> list[int]:
        open_now = router.net_connections("tcp")
        return sorted(one.raddr.port for one in open_now if one.raddr and one.raddr.port in ports)

    wait_until(lambda: connected_ports() == sorted(ports), "a connection to each worker")


def test_a_worker_that_is_killed_loses_all_its_requests_at_once() -> None:
    require_server()
    worker = WorkerProcess()

    async def scene() -> None:
        async with open_client(worker) as client:
            requests = [WorkerRequest(client, worker.address, command(), PROMPT) for _ in range(4)]
            for request in requests:
                assert (await anext(request)).token_ids
            worker.process.kill()
            for request in requests:
                with pytest.raises(WorkerLost, match="connection broke"):
                    while True:
                        await anext(request)
            await until(lambda: is_known_as_gone(client), "the worker to be known as gone")

    def is_known_as_gone(client: ShortestWay) -> bool:
        try:
            return WorkerRequest(client, worker.address, command(), PROMPT).stream is None
        except WorkerLost:
            return True

    try:
        asyncio.run(scene())
    finally:
        worker.process.kill()
        worker.process.communicate()
