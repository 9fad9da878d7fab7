"""Workers over Triton's gRPC streaming API.

Decoupled BLS deadlocks under concurrency in every released Triton (docs/architecture.md), so this client serves
workers on the own server as well. Each request has a stream of its own, half-closed after the request: cancelling it
cancels exactly that request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from kelp.client.base import WorkerAddress, WorkerOutput
from kelp.core.errors import KelpError, ProtocolError, WorkerLost, from_message
from kelp.core.messages import (
    WORKER_EVENT,
    WORKER_STATUS,
    DrainCommand,
    GenerateCommand,
    Message,
    StatusCommand,
    WorkerStatus,
    decode_message,
    encode_message,
)

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]
_DRAIN_TIMEOUT_S = 5.0


def _inputs(command: Message, prompt: npt.NDArray[np.int32] | None) -> list[Any]:
    document = triton.InferInput("command", [1], "BYTES")
    document.set_data_from_numpy(np.array([encode_message(command)], dtype=np.object_))
    if prompt is None:
        return [document]
    tokens = triton.InferInput("input_ids", [len(prompt)], "INT32")
    tokens.set_data_from_numpy(np.ascontiguousarray(prompt, dtype=np.int32))
    return [document, tokens]


def _event(result: Any) -> bytes:
    array = result.as_numpy("event")
    return bytes(array[0]) if array is not None and array.size else b""


class GrpcWorkerStream:
    """One request's stream; see `client.base.WorkerStream`."""

    def __init__(self, client: Any, model_name: str, inputs: list[Any], endpoint: str) -> None:
        self._where = f"worker {endpoint}/{model_name}"
        self._is_over = False

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": model_name, "inputs": inputs}

        self._responses = client.stream_infer(requests())

    async def __aiter__(self) -> AsyncIterator[WorkerOutput]:
        """See `WorkerStream`."""
        while True:
            result = await self._next()
            if result is None:
                return
            yield self._output(result)

    async def results(self) -> AsyncIterator[Any]:
        """Raw Triton results, errors mapped."""
        while (result := await self._next()) is not None:
            yield result

    async def close(self) -> None:
        """See `WorkerStream`."""
        if self._is_over:
            return
        self._is_over = True
        self._responses.cancel()
        await _drain(self._responses)

    async def _next(self) -> Any:
        """Next Triton result, or None after the last."""
        try:
            result, error = await self._responses.__anext__()
        except StopAsyncIteration:
            self._is_over = True
            return None
        except (grpc.RpcError, InferenceServerException) as error:
            self._is_over = True
            raise WorkerLost(f"{self._where}: connection broke: {_reason(error)}") from None
        if error is not None:
            raise self._typed(error)
        return result

    def _typed(self, error: Any) -> KelpError:
        typed = from_message(str(error.message() or ""))
        return WorkerLost(f"{self._where}: {typed.text}") if type(typed) is WorkerLost else typed

    def _output(self, result: Any) -> WorkerOutput:
        tokens = result.as_numpy("output_ids")
        log_probs = result.as_numpy("output_log_probs")
        event = _event(result)
        told = decode_message(WORKER_EVENT, event, self._where) if event else None
        ids = () if tokens is None else tuple(tokens.tolist())
        probs = () if log_probs is None else tuple(log_probs.tolist())
        if len(ids) != len(probs):
            raise ProtocolError(f"{self._where}: {len(ids)} tokens with {len(probs)} log_probs")
        return WorkerOutput(ids, probs, told)


def _reason(error: Exception) -> str:
    details = getattr(error, "details", None)
    return str(details()) if callable(details) else str(error)


async def _drain(responses: Any) -> None:
    async def exhaust() -> None:
        async for _ in responses:
            pass

    # grpc.aio reports a cancelled call by raising CancelledError into whoever reads it: read in a task of its own,
    # so that it is never mistaken for a cancellation of the caller.
    reading = asyncio.ensure_future(exhaust())
    await asyncio.wait({reading}, timeout=_DRAIN_TIMEOUT_S)
    if reading.done() and not reading.cancelled():
        reading.exception()


class GrpcWorkerClient:
    """One channel per tritonserver; see `client.base.WorkerClient`."""

    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}

    def generate(
        self, address: WorkerAddress, command: GenerateCommand, prompt: npt.NDArray[np.int32]
    ) -> GrpcWorkerStream:
        """See `WorkerClient`."""
        return self._stream(address, _inputs(command, prompt))

    async def control(self, address: WorkerAddress, command: DrainCommand | None) -> WorkerStatus:
        """See `WorkerClient`."""
        stream = self._stream(address, _inputs(command or StatusCommand(), None))
        what = f"status of {address.endpoint}/{address.model_name}"
        try:
            async for result in stream.results():
                if event := _event(result):
                    return decode_message(WORKER_STATUS, event, what)
        finally:
            await stream.close()
        raise ProtocolError(f"{what}: the answer has no status")

    async def close(self) -> None:
        """See `WorkerClient`."""
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.close()

    def _stream(self, address: WorkerAddress, inputs: list[Any]) -> GrpcWorkerStream:
        client = self._clients.get(address.endpoint)
        if client is None:
            client = triton.InferenceServerClient(address.endpoint, channel_args=_CHANNEL_OPTIONS)
            self._clients[address.endpoint] = client
        return GrpcWorkerStream(client, address.model_name, inputs, address.endpoint)
