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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2_grpc

from kelp.client.base import Receive, WorkerAddress, WorkerOutput
from kelp.client.grpc.shared_stream import RawTensors, Reply, SharedStream, infer_request
from kelp.core.answer_seal import AnswerSeal
from kelp.core.errors import KelpError, ProtocolError
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
from kelp.core.peer_auth import WORKER_COMMAND_PROOF, PeerToken, seal
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
_UNUSED_S = 60.0
"""A channel that nobody has used for this long is closed."""
_LENGTH = struct.Struct("<I")
_NUMBER_BYTES = 4


@dataclass(frozen=True, slots=True)
class _Party:
    """A worker, and what shows it that we are a peer."""

    address: WorkerAddress
    token: PeerToken | None

    @property
    def where(self) -> str:
        """Names the worker in errors."""
        return f"worker {self.address.worker_id}"

    def request(self, request_id: str, command: Message, prompt: npt.NDArray[np.int32] | None = None) -> Any:
        """A command as it travels; what only asks for counts needs no proof."""
        address, document = self.address, encode_message(command)
        beside = b"" if prompt is None else np.ascontiguousarray(prompt, dtype="<i4").tobytes()
        if not isinstance(command, StatusCommand):
            document = seal(self.token, WORKER_COMMAND_PROOF, self._scope, document, beside)
        tensors = {"command": ("BYTES", 1, _LENGTH.pack(len(document)) + document)}
        if prompt is not None:
            tensors["input_ids"] = ("INT32", len(prompt), beside)
        return infer_request(address.model_name, request_id, tensors)

    def answers_to(self, request: Any) -> AnswerSeal:
        """What opens the answers to a request that `request` made."""
        return AnswerSeal(self.token, self._scope, request.raw_input_contents[0][_LENGTH.size :])

    @property
    def _scope(self) -> tuple[str, ...]:
        return self.address.worker_id, self.address.epoch


def _event(tensors: RawTensors) -> bytes:
    return tensors.get("event", b"")[_LENGTH.size :]


def _numbers(raw: bytes, dtype: str, where: str) -> tuple[Any, ...]:
    if len(raw) % _NUMBER_BYTES:
        raise ProtocolError(f"{where}: {len(raw)} bytes are no whole number of elements")
    return tuple(np.frombuffer(raw, dtype=dtype).tolist()) if raw else ()


class GrpcWorkerStream:
    """One request's responses; see `client.base.WorkerStream`.

    Args:
        shared: Where it starts.
        cancelling: Finds a stream that can take its cancellation: `shared` itself may have been given up by then.
    """

    def __init__(
        self,
        shared: SharedStream,
        cancelling: Callable[[], SharedStream],
        party: _Party,
        request: Any,
        receive: Receive,
    ) -> None:
        self._shared = shared
        self._cancelling = cancelling
        self._party = party
        self._request_id = request.id
        self._receive = receive
        self._answers = party.answers_to(request)
        self._is_closing = False
        self._is_told = False
        self._has_finished = False
        self._reply: Reply = shared.start(request, self._take)

    @property
    def has_ended(self) -> bool:
        """See `WorkerStream`."""
        return self._reply.has_ended

    async def close(self) -> None:
        """See `WorkerStream`."""
        if self._is_closing or self._reply.has_ended:
            return
        self._is_closing = True
        if not self._has_finished:
            await self._cancel()
        if not await self._reply.wait_ended(_DRAIN_TIMEOUT_S):
            self._shared.abandon(self._request_id)

    async def _cancel(self) -> None:
        stream, cancel_id = self._cancelling(), f"{self._request_id} cancel"
        cancel = self._party.request(cancel_id, CancelCommand(request_id=self._request_id))
        answer = stream.start(cancel, _ignore)
        if not await answer.wait_ended(_CANCEL_TIMEOUT_S):
            stream.abandon(cancel_id)

    def _take(self, item: RawTensors | KelpError | None) -> None:
        if self._is_told:
            return
        try:
            self._tell(item if item is None or isinstance(item, KelpError) else self._output(item))
        except KelpError as error:
            self._tell(error)

    def _tell(self, item: WorkerOutput | KelpError | None) -> None:
        self._is_told = not isinstance(item, WorkerOutput)
        self._receive(item)

    def _output(self, tensors: RawTensors) -> WorkerOutput:
        raw_ids, raw_log_probs = tensors.get("output_ids", b""), tensors.get("output_log_probs", b"")
        event = self._answers.open(_event(tensors), raw_ids, raw_log_probs)
        where = self._party.where
        ids, log_probs = _numbers(raw_ids, "<i4", where), _numbers(raw_log_probs, "<f4", where)
        told: WorkerEvent | None = decode_message(WORKER_EVENT, event, where) if event else None
        self._has_finished = isinstance(told, Finished)
        if len(ids) != len(log_probs):
            raise ProtocolError(f"{where}: {len(ids)} tokens with {len(log_probs)} log_probs")
        return WorkerOutput(ids, log_probs, told)


def _ignore(_: object) -> None:
    pass


class GrpcWorkerClient:
    """One channel per tritonserver and one stream per worker; see `client.base.WorkerClient`.

    Both go when nobody has used them for a while: workers come and go for as long as a router lives.

    Args:
        token: What shows workers that we are a peer; None for workers that do not ask.
    """

    def __init__(self, token: PeerToken | None = None) -> None:
        self._token = token
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._streams: dict[WorkerAddress, SharedStream] = {}
        self._replaced: list[tuple[str, SharedStream]] = []
        self._num_asked = itertools.count()
        self._used: set[str] = set()
        self._pruning: asyncio.Task[None] | None = None

    @property
    def num_channels(self) -> int:
        """Servers connected."""
        return len(self._channels)

    def generate(
        self, address: WorkerAddress, command: GenerateCommand, prompt: npt.NDArray[np.int32], receive: Receive
    ) -> GrpcWorkerStream:
        """See `WorkerClient`."""
        party = _Party(address, self._token)
        request = party.request(command.request_id, command, prompt)
        return GrpcWorkerStream(self._stream(address), partial(self._stream, address), party, request, receive)

    async def control(self, address: WorkerAddress, command: DrainCommand | None) -> WorkerStatus:
        """See `WorkerClient`."""
        request_id = f"control {next(self._num_asked)}"
        shared, what = self._stream(address), f"status of {address.worker_id}"
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def take(item: RawTensors | KelpError | None) -> None:
            if answer.done():
                return
            if isinstance(item, KelpError):
                answer.set_exception(item)
            elif item is None:
                answer.set_exception(ProtocolError(f"{what}: the answer has no status"))
            elif event := _event(item):
                answer.set_result(event)

        shared.start(_Party(address, self._token).request(request_id, command or StatusCommand()), take)
        try:
            return decode_message(WORKER_STATUS, await answer, what)
        except asyncio.CancelledError:
            shared.abandon(request_id)
            raise

    def expect(self, addresses: Iterable[WorkerAddress]) -> None:
        """See `WorkerClient`; there is nothing to prepare."""

    def has_gone(self, address: WorkerAddress) -> bool:
        """See `WorkerClient`; Triton does not tell."""
        return False

    async def close(self) -> None:
        """See `WorkerClient`."""
        if self._pruning is not None:
            self._pruning.cancel()
            self._pruning = None
        streams, self._streams = self._streams, {}
        channels, self._channels = self._channels, {}
        replaced, self._replaced = self._replaced, []
        await asyncio.gather(*(stream.close() for stream in (*streams.values(), *(stream for _, stream in replaced))))
        for channel in channels.values():
            await channel.close(None)

    def _stream(self, address: WorkerAddress) -> SharedStream:
        self._used.add(address.endpoint)
        stream = self._streams.get(address)
        if stream is None or not stream.is_usable:
            if stream is not None:
                self._replaced.append((address.endpoint, stream))
            stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel(address.endpoint))
            stream = self._streams[address] = SharedStream(stub, _Party(address, None).where)
        return stream

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        channel = self._channels.get(endpoint)
        if channel is None:
            channel = self._channels[endpoint] = grpc.aio.insecure_channel(endpoint, options=_CHANNEL_OPTIONS)
        if self._pruning is None:
            self._pruning = asyncio.ensure_future(self._prune())
        return channel

    async def _prune(self) -> None:
        while self._channels:
            await asyncio.sleep(_UNUSED_S)
            self._streams = {address: stream for address, stream in self._streams.items() if not stream.is_over}
            self._replaced = [(endpoint, stream) for endpoint, stream in self._replaced if not stream.is_over]
            busy = self._used.union((address.endpoint for address in self._streams), dict(self._replaced))
            self._used = set()
            unused = [self._channels.pop(endpoint) for endpoint in self._channels.keys() - busy]
            for channel in unused:
                await channel.close(None)
        self._pruning = None
