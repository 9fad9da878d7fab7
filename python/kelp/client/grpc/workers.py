"""Workers over Triton's gRPC streaming API.

Decoupled BLS deadlocks under concurrency in every released Triton (docs/architecture.md), so this client serves
workers on the own server as well. A request is cancelled by a command to its worker, and its answer awaited to the
end: a cancelled gRPC call may meet a response on its way, and Triton (2.51) then keeps a reference to the model for
ever, so that it never unloads.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2_grpc

from kelp.client.base import WorkerAddress, WorkerOutput
from kelp.client.grpc.shared_stream import RawTensors, Reply, SharedStream, infer_request
from kelp.core.errors import ProtocolError
from kelp.core.messages import (
    WORKER_EVENT,
    WORKER_STATUS,
    CancelCommand,
    DrainCommand,
    Finished,
    GenerateCommand,
    StatusCommand,
    WorkerEvent,
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
_LENGTH = struct.Struct("<I")


def _where(address: WorkerAddress) -> str:
    return f"worker {address.endpoint}/{address.model_name}"


def _request(
    address: WorkerAddress, request_id: str, command: Message, prompt: npt.NDArray[np.int32] | None = None
) -> Any:
    document = encode_message(command)
    tensors = {"command": ("BYTES", 1, _LENGTH.pack(len(document)) + document)}
    if prompt is not None:
        tensors["input_ids"] = ("INT32", len(prompt), np.ascontiguousarray(prompt, dtype=np.int32).tobytes())
    return infer_request(address.model_name, request_id, tensors)


def _event(tensors: RawTensors) -> bytes:
    return tensors.get("event", b"")[_LENGTH.size :]


def _numbers(tensors: RawTensors, name: str, dtype: str) -> tuple[Any, ...]:
    raw = tensors.get(name, b"")
    return tuple(np.frombuffer(raw, dtype=dtype).tolist()) if raw else ()


class GrpcWorkerStream:
    """One request's responses; see `client.base.WorkerStream`."""

    def __init__(self, shared: SharedStream, address: WorkerAddress, request: Any) -> None:
        self._shared = shared
        self._address = address
        self._request_id = request.id
        self._reply: Reply = shared.start(request)
        self._is_closing = False
        self._has_finished = False

    def __aiter__(self) -> GrpcWorkerStream:
        """See `WorkerStream`."""
        return self

    async def __anext__(self) -> WorkerOutput:
        """See `WorkerStream`."""
        return self._output(await self._reply.__anext__())

    async def close(self) -> None:
        """See `WorkerStream`."""
        if self._is_closing or self._reply.has_ended:
            return
        self._is_closing = True
        if not self._has_finished and self._shared.is_usable:
            command = CancelCommand(request_id=self._request_id)
            cancel_id = f"{self._request_id} cancel"
            answer = self._shared.start(_request(self._address, cancel_id, command))
            if not await answer.wait_ended(_CANCEL_TIMEOUT_S):
                self._shared.abandon(cancel_id)
        if not await self._reply.wait_ended(_DRAIN_TIMEOUT_S):
            self._shared.abandon(self._request_id)

    def _output(self, tensors: RawTensors) -> WorkerOutput:
        ids = _numbers(tensors, "output_ids", "<i4")
        log_probs = _numbers(tensors, "output_log_probs", "<f4")
        event = _event(tensors)
        told: WorkerEvent | None = decode_message(WORKER_EVENT, event, _where(self._address)) if event else None
        self._has_finished = isinstance(told, Finished)
        if len(ids) != len(log_probs):
            raise ProtocolError(f"{_where(self._address)}: {len(ids)} tokens with {len(log_probs)} log_probs")
        return WorkerOutput(ids, log_probs, told)


class GrpcWorkerClient:
    """One channel per tritonserver and one stream per worker; see `client.base.WorkerClient`."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._streams: dict[WorkerAddress, SharedStream] = {}
        self._num_asked = itertools.count()

    def generate(
        self, address: WorkerAddress, command: GenerateCommand, prompt: npt.NDArray[np.int32]
    ) -> GrpcWorkerStream:
        """See `WorkerClient`."""
        request = _request(address, command.request_id, command, prompt)
        return GrpcWorkerStream(self._stream(address), address, request)

    async def control(self, address: WorkerAddress, command: DrainCommand | None) -> WorkerStatus:
        """See `WorkerClient`."""
        request_id = f"control {next(self._num_asked)}"
        shared = self._stream(address)
        reply = shared.start(_request(address, request_id, command or StatusCommand()))
        what = f"status of {address.endpoint}/{address.model_name}"
        try:
            async for tensors in reply:
                if event := _event(tensors):
                    return decode_message(WORKER_STATUS, event, what)
        except asyncio.CancelledError:
            shared.abandon(request_id)
            raise
        raise ProtocolError(f"{what}: the answer has no status")

    async def close(self) -> None:
        """See `WorkerClient`."""
        streams, self._streams = self._streams, {}
        channels, self._channels = self._channels, {}
        await asyncio.gather(*(stream.close() for stream in streams.values()))
        for channel in channels.values():
            await channel.close(None)

    def _stream(self, address: WorkerAddress) -> SharedStream:
        stream = self._streams.get(address)
        if stream is None or not stream.is_usable:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel(address.endpoint))
            stream = self._streams[address] = SharedStream(stub, _where(address))
        return stream

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        channel = self._channels.get(endpoint)
        if channel is None:
            channel = self._channels[endpoint] = grpc.aio.insecure_channel(endpoint, options=_CHANNEL_OPTIONS)
        return channel
