"""Bringing a request to a chosen phase of its life, on a server that runs one sequence at a time."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol

import numpy as np
import pytest

from kelp.client.base import WorkerAddress, WorkerOutput
from kelp.client.grpc import GrpcWorkerClient
from kelp.core.messages import GenerateCommand, Rendezvous, SamplingParams, WorkerStatus
from kelp.core.metrics import QUEUE_LENGTH
from kelp.core.types import Role
from support.llm_client import Call
from support.serving import HOST, KelpServer, why_not
from support.waiting import wait_until
from support.worker_outputs import WorkerRequest

QUESTION: dict[str, object] = {"text_input": "The capital of France is", "max_tokens": 4}
STORY = "Once upon a time there was a river that ran from the hills to the sea. "
PROMPT = np.arange(1000, 1040, dtype=np.int32)
"""Of direct requests: three blocks, the last one not full."""
_salts = itertools.count()


def long_request(num_repeats: int = 45, **fields: object) -> dict[str, object]:
    """About 18 tokens per repeat, never cached, many tokens to come."""
    return {
        "text_input": STORY * num_repeats,
        "max_tokens": 400,
        "ignore_eos": True,
        "cache_salt": f"fault {next(_salts)}",
        **fields,
    }


def short_request(**fields: object) -> dict[str, object]:
    return long_request(1, **fields)


def require_server() -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)


class OpenRequest(Protocol):
    """A client that can go away."""

    def wait_tokens(self, count: int) -> None:
        """Wait until that many responses with tokens have come."""

    def leave(self) -> None:
        """Go."""


class GrpcClient:
    """Goes by cancelling its stream."""

    def __init__(self, server: KelpServer, fields: dict[str, object]) -> None:
        self._call = server.open(**fields)

    def wait_tokens(self, count: int) -> None:
        num_tokens = 0
        while num_tokens < count:
            num_tokens += len(self._call.next().token_ids)

    def leave(self) -> None:
        self._call.cancel()


class HttpClient:
    """Goes by closing its connection; Triton notices with the first response that it cannot deliver."""

    def __init__(self, server: KelpServer, fields: dict[str, object]) -> None:
        body = json.dumps({"stream": True, **fields}).encode()
        head = f"POST /v2/models/llm/generate_stream HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket = socket.create_connection((HOST, server.http_port), timeout=60.0)
        self._socket.sendall(head.encode() + body)

    def wait_tokens(self, count: int) -> None:
        received = b""
        while received.count(b"data: ") < count:
            piece = self._socket.recv(65536)
            assert piece, f"the server hung up after {received!r}"
            received += piece

    def leave(self) -> None:
        self._socket.close()


def used_blocks(status: WorkerStatus) -> int:
    """Blocks that requests hold."""
    return status.num_blocks - status.num_free_blocks - status.num_cached_blocks


def wait_status(server: KelpServer, what: str, **conditions: Any) -> None:
    """Wait until each named worker's status satisfies its condition."""

    def holds() -> bool:
        statuses = server.statuses()
        return all(condition(statuses[name]) for name, condition in conditions.items())

    wait_until(holds, what, 30.0)


def wait_both(server: KelpServer, what: str, holds: Callable[[WorkerStatus], bool]) -> None:
    wait_status(server, what, prefill=holds, decode=holds)


@contextlib.contextmanager
def busy_workers(server: KelpServer) -> Iterator[None]:
    """Both workers' only slots are taken."""
    with Call(server.grpc_endpoint, {"stream": True, **long_request(max_tokens=1200)}):
        wait_both(server, "busy workers", lambda status: status.num_running == 1)
        yield


def wait_queued(server: KelpServer) -> None:
    wait_both(server, "a queued request", lambda status: status.num_waiting == 1)


def wait_unqueued(server: KelpServer) -> None:
    wait_both(server, "an empty queue", lambda status: status.num_waiting == 0)


def wait_held_back(server: KelpServer, num_requests: int) -> None:
    """The router keeps so many requests in its own queue, as its metrics say about two seconds later."""
    wait_until(lambda: _num_held_back(server) == num_requests, f"{num_requests} requests in the router's queue", 30.0)


def _num_held_back(server: KelpServer) -> int | None:
    with urllib.request.urlopen(f"http://{HOST}:{server.metrics_port}/metrics", timeout=5.0) as response:
        lines = response.read().decode().splitlines()
    values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{QUEUE_LENGTH.name}{{")]
    return int(sum(values)) if values else None


def wait_prefilling(server: KelpServer) -> None:
    wait_status(server, "a running prefill", prefill=lambda status: status.num_running == 1)


def wait_reserved(server: KelpServer) -> None:
    """The decode worker has reserved the prompt's blocks and fetches the finished chunks into them."""
    wait_status(
        server,
        "transfers during the prefill",
        prefill=lambda status: status.num_running == 1 and status.num_leases == 1,
        decode=lambda status: used_blocks(status) > 0,
    )


class DirectRequest:
    """A command sent straight to a worker, as a router does."""

    def __init__(self, server: KelpServer, role: Role, rendezvous: Rendezvous, **fields: object) -> None:
        command = GenerateCommand.model_validate(
            {
                "request_id": uuid.uuid4().hex,
                "role": role,
                "sampling": SamplingParams(max_tokens=8, ignore_eos=True),
                "seed_hash_hex": uuid.uuid4().hex,
                "rendezvous": rendezvous,
                **fields,
            }
        )
        record = server.records()[role.value]
        self._client = GrpcWorkerClient(server.peer_token)
        address = WorkerAddress(record.endpoint, record.model_name, epoch=record.epoch)
        self._stream = WorkerRequest(self._client, address, command, PROMPT)

    async def outputs(self) -> list[WorkerOutput]:
        """Everything the worker says.

        Raises:
            KelpError: Its error.
        """
        return [output async for output in self._stream]

    async def close(self) -> None:
        await self._stream.close()
        await self._client.close()


@contextlib.asynccontextmanager
async def direct_request(
    server: KelpServer, role: Role, rendezvous: Rendezvous, **fields: object
) -> AsyncIterator[DirectRequest]:
    """See `DirectRequest`."""
    request = DirectRequest(server, role, rendezvous, **fields)
    try:
        yield request
    finally:
        await request.close()
