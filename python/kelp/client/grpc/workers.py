"""Workers over Triton's gRPC streaming API.

Decoupled BLS deadlocks under concurrency in every released Triton (docs/architecture.md), so this client serves
workers on the own server as well. Each request has a stream of its own, half-closed after the request. A request is
cancelled by a command to its worker, and its stream read to the end: a cancelled gRPC call may meet a response on its
way, and Triton (2.51) then keeps a reference to the model for ever, so that it never unloads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
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
    CancelCommand,
    DrainCommand,
    Finished,
    GenerateCommand,
    StatusCommand,
    WorkerStatus,
)
from kelp.core.wire import Message, decode_message, encode_message

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
"""The back-off is short because a restarted worker listens at the same address; gRPC's own grows to two minutes."""

_CANCEL_TIMEOUT_S = 1.0
_DRAIN_TIMEOUT_S = 4.0


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
    """One request's stream; see `client.base.WorkerStream`.

    Args:
        cancel: Asks the worker to end the request; None for one that ends by itself.
    """

    def __init__(
        self,
        client: Any,
        address: WorkerAddress,
        inputs: list[Any],
        cancel: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._where = f"worker {address.endpoint}/{address.model_name}"
        self._cancel = cancel
        self._is_over = False
        self._is_closing = False
        self._has_ended = False
        self._reading = asyncio.Lock()

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": address.model_name, "inputs": inputs}

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
        """See `WorkerStream`; whoever still reads may go on, and shares what is left with the draining."""
        if self._is_closing or self._is_over:
            return
        self._is_closing = True
        draining = asyncio.ensure_future(self._drain())
        if self._cancel is not None and not self._has_ended:
            await self._cancel()
        await asyncio.wait({draining}, timeout=_DRAIN_TIMEOUT_S)
        if not draining.done():
            self._responses.cancel()
            await asyncio.wait({draining}, timeout=_DRAIN_TIMEOUT_S)

    async def _drain(self) -> None:
        while not self._is_over:
            with contextlib.suppress(KelpError):
                await self._next()

    async def _next(self) -> Any:
        """Next Triton result, or None after the last."""
        async with self._reading:
            result, error = (None, None) if self._is_over else await self._read()
        if error is not None:
            self._has_ended = True
            raise self._typed(error)
        return result

    async def _read(self) -> tuple[Any, Any]:
        try:
            result, error = await self._responses.__anext__()
        except StopAsyncIteration:
            self._is_over = True
            return None, None
        except (grpc.RpcError, InferenceServerException) as error:
            self._is_over = True
            raise WorkerLost(f"{self._where}: connection broke: {_reason(error)}") from None
        except asyncio.CancelledError:
            # grpc.aio ends a call whose reader is cancelled, and tells readers of a cancelled call in this way.
            self._is_over = True
            raise
        return result, error

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
        self._has_ended = isinstance(told, Finished)
        if len(ids) != len(probs):
            raise ProtocolError(f"{self._where}: {len(ids)} tokens with {len(probs)} log_probs")
        return WorkerOutput(ids, probs, told)


def _reason(error: Exception) -> str:
    details = getattr(error, "details", None)
    return str(details()) if callable(details) else str(error)


class GrpcWorkerClient:
    """One channel per tritonserver; see `client.base.WorkerClient`."""

    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}

    def generate(
        self, address: WorkerAddress, command: GenerateCommand, prompt: npt.NDArray[np.int32]
    ) -> GrpcWorkerStream:
        """See `WorkerClient`."""

        async def cancel() -> None:
            with contextlib.suppress(KelpError, asyncio.TimeoutError):
                await asyncio.wait_for(
                    self._ask(address, CancelCommand(request_id=command.request_id)), _CANCEL_TIMEOUT_S
                )

        return self._stream(address, _inputs(command, prompt), cancel)

    async def control(self, address: WorkerAddress, command: DrainCommand | None) -> WorkerStatus:
        """See `WorkerClient`."""
        return await self._ask(address, command or StatusCommand())

    async def close(self) -> None:
        """See `WorkerClient`."""
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.close()

    async def _ask(self, address: WorkerAddress, command: Message) -> WorkerStatus:
        stream = self._stream(address, _inputs(command, None))
        what = f"status of {address.endpoint}/{address.model_name}"
        try:
            async for result in stream.results():
                if event := _event(result):
                    return decode_message(WORKER_STATUS, event, what)
        finally:
            await stream.close()
        raise ProtocolError(f"{what}: the answer has no status")

    def _stream(
        self, address: WorkerAddress, inputs: list[Any], cancel: Callable[[], Awaitable[None]] | None = None
    ) -> GrpcWorkerStream:
        client = self._clients.get(address.endpoint)
        if client is None:
            client = triton.InferenceServerClient(address.endpoint, channel_args=_CHANNEL_OPTIONS)
            self._clients[address.endpoint] = client
        return GrpcWorkerStream(client, address, inputs, cancel)
