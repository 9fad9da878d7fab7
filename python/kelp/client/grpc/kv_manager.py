"""The control channel to KV block managers: unary calls of their model.

Operations that are ready at the same moment travel together: a call costs more than an operation. What may take a while
to be answered (`Store`, `Onboard`, `Await`, `Match`, `Join`, `Clear`) is sent alone, because a batch is answered as a
whole.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from kelp.client.base import WorkerAddress
from kelp.core.errors import DeadlineExceeded, KelpError, ProtocolError, WorkerLost, from_message
from kelp.core.kv_manager_messages import (
    Commit,
    GetStats,
    Join,
    Operation,
    Pin,
    Release,
    Renew,
    Result,
    decode_results,
    encode_batch,
)
from kelp.core.peer_auth import KV_OPERATIONS_PROOF, KV_RESULTS_PROOF, PeerToken, proof_in, seal, unseal
from kelp.core.schema import KV_BLOCK_MANAGER

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    ("grpc.max_send_message_length", 16 * 1024 * 1024),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
]
_QUICK = (Commit, GetStats, Pin, Release, Renew)
_MAX_BATCH = 64
_PATIENCE_S = 30.0
"""How long an answer that is late for its caller is still awaited."""
_RECONNECT_S = 3.0
"""How long a connection that has broken gets to come back before somebody joins over it: gRPC fails what is asked while
it waits before its next attempt, although the manager that was announced meanwhile is there."""
_LENGTH = struct.Struct("<I")
_Waiting = tuple[Operation, "asyncio.Future[Result]"]


class GrpcKvManagerClient:
    """One channel per manager; belongs to one event loop. Implements `client.base.KvManagerClient`.

    Args:
        token: What shows managers that we are a peer, and us that they are; None for managers that do not ask.
    """

    def __init__(self, token: PeerToken | None = None) -> None:
        self._token = token
        self._channels: dict[str, Any] = {}
        self._quick: dict[tuple[WorkerAddress, float], list[_Waiting]] = {}
        self._calls: set[asyncio.Task[Any]] = set()

    async def call(self, address: WorkerAddress, operations: Sequence[Operation], timeout_s: float) -> list[Result]:
        """See `KvManagerClient`."""
        loop = asyncio.get_running_loop()
        waiting: list[_Waiting] = [(operation, loop.create_future()) for operation in operations]
        for item in waiting:
            if isinstance(item[0], _QUICK):
                self._queue(address, timeout_s, item)
            else:
                self._start(address, timeout_s, [item])
        return list(await asyncio.gather(*(answer for _, answer in waiting)))

    async def close(self) -> None:
        """Close all channels; calls under way fail with WorkerLost."""
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close(None)

    def _queue(self, address: WorkerAddress, timeout_s: float, item: _Waiting) -> None:
        key = (address, timeout_s)
        if key not in self._quick:
            self._quick[key] = []
            asyncio.get_running_loop().call_soon(self._flush, key)
        self._quick[key].append(item)

    def _flush(self, key: tuple[WorkerAddress, float]) -> None:
        batch = self._quick.pop(key)
        for begin in range(0, len(batch), _MAX_BATCH):
            self._start(*key, batch[begin : begin + _MAX_BATCH])

    def _start(self, address: WorkerAddress, timeout_s: float, batch: list[_Waiting]) -> None:
        call = asyncio.ensure_future(self._exchange(address, timeout_s, batch))
        self._calls.add(call)

        def ended(done: asyncio.Task[None]) -> None:
            self._calls.discard(done)
            # Also of a call that was cancelled before it began.
            _fail(batch, WorkerLost(f"{_where(address)}: the connection was closed"))

        call.add_done_callback(ended)

    async def _exchange(self, address: WorkerAddress, timeout_s: float, batch: list[_Waiting]) -> None:
        try:
            results = await self._infer(address, timeout_s, [operation for operation, _ in batch])
        except KelpError as error:
            _fail(batch, error)
        else:
            for (_, answer), result in zip(batch, results, strict=True):
                if not answer.done():
                    answer.set_result(result)

    async def _infer(self, address: WorkerAddress, timeout_s: float, operations: list[Operation]) -> list[Result]:
        scope = (f"{address.endpoint}/{address.model_name}", address.epoch)
        raw = seal(self._token, KV_OPERATIONS_PROOF, scope, encode_batch(operations))
        request = service_pb2.ModelInferRequest(model_name=address.model_name)
        request.inputs.add(name=KV_BLOCK_MANAGER.inputs[0].name, datatype="BYTES", shape=(1,))
        request.raw_input_contents.append(_LENGTH.pack(len(raw)) + raw)
        if isinstance(operations[0], Join):
            await self._reconnect(address.endpoint)
        sent = asyncio.ensure_future(self._send(address, request, timeout_s + _PATIENCE_S))
        self._calls.add(sent)
        sent.add_done_callback(self._calls.discard)
        # Not cancelled when it is late: Triton (2.51) then keeps a reference to the model for ever.
        done, _ = await asyncio.wait({sent}, timeout=timeout_s)
        if not done:
            sent.add_done_callback(lambda late: late.cancelled() or late.exception())
            raise DeadlineExceeded(f"{_where(address)}: no answer within {timeout_s} s")
        response = sent.result()
        if len(response.raw_output_contents) != 1:
            raise ProtocolError(f"{_where(address)}: {len(response.raw_output_contents)} outputs, not 1")
        answer = response.raw_output_contents[0][_LENGTH.size :]
        results = decode_results(unseal(self._token, KV_RESULTS_PROOF, scope, answer, proof_in(raw)))
        if len(results) != len(operations):
            raise ProtocolError(f"{_where(address)}: {len(results)} results of {len(operations)} operations")
        return results

    async def _send(self, address: WorkerAddress, request: Any, timeout_s: float) -> Any:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel(address.endpoint))
        try:
            return await stub.ModelInfer(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise _typed(error, address) from None

    async def _reconnect(self, endpoint: str) -> None:
        connecting = asyncio.ensure_future(self._channel(endpoint).channel_ready())
        try:
            await asyncio.wait({connecting}, timeout=_RECONNECT_S)
        finally:
            connecting.cancel()

    def _channel(self, endpoint: str) -> Any:
        channel = self._channels.get(endpoint)
        if channel is None:
            channel = self._channels[endpoint] = grpc.aio.insecure_channel(endpoint, options=_CHANNEL_OPTIONS)
        return channel


def _fail(batch: list[_Waiting], error: KelpError) -> None:
    for _, answer in batch:
        if not answer.done():
            answer.set_exception(error)
            # Seen by then: whoever asked may have gone.
            answer.exception()


def _typed(error: Any, address: WorkerAddress) -> KelpError:
    typed = from_message(str(error.details()))
    return WorkerLost(f"{_where(address)}: {typed.text}") if type(typed) is WorkerLost else typed


def _where(address: WorkerAddress) -> str:
    return f"KV block manager {address.endpoint}/{address.model_name}"
