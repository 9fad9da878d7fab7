"""A gRPC server that speaks Triton's protocol and does what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

_WIRE = {np.dtype(np.int32): "INT32", np.dtype(np.float32): "FP32"}


def response(**tensors: Any) -> service_pb2.ModelStreamInferResponse:
    """One response; a `bytes` value is one BYTES element, anything else an array."""
    answer = service_pb2.ModelStreamInferResponse()
    for name, value in tensors.items():
        output = answer.infer_response.outputs.add(name=name)
        if isinstance(value, bytes):
            output.datatype, raw = "BYTES", struct.pack("<I", len(value)) + value
            output.shape.append(1)
        else:
            output.datatype, raw = _WIRE[value.dtype], value.tobytes()
            output.shape.extend(value.shape)
        answer.infer_response.raw_output_contents.append(raw)
    return answer


def said(token_ids: Sequence[int], log_probs: Sequence[float], event: bytes | None = None) -> Any:
    """A worker's response."""
    told = {} if event is None else {"event": event}
    return response(
        output_ids=np.array(token_ids, dtype=np.int32), output_log_probs=np.array(log_probs, dtype=np.float32), **told
    )


def failure(message: str) -> service_pb2.ModelStreamInferResponse:
    return service_pb2.ModelStreamInferResponse(error_message=message)


def _to(request: Any, answer: Any) -> Any:
    """An answer that names its request, as Triton's do."""
    named = service_pb2.ModelStreamInferResponse()
    named.CopyFrom(answer)
    named.infer_response.id = request.id
    return named


def _final(request: Any) -> Any:
    """The empty last response that Triton sends on demand."""
    last = _to(request, service_pb2.ModelStreamInferResponse())
    last.infer_response.parameters["triton_final_response"].bool_param = True
    return last


@dataclass
class TritonDouble(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers each request with `answers`, then keeps it running until it is cancelled or `may_end`.

    Attributes:
        num_streams: gRPC calls so far, and `num_open` of them now.
        num_running: Requests that have not had their final response.
        num_cancelled: Calls that the client cancelled.
    """

    answers: list[Any] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    num_streams: int = 0
    num_open: int = 0
    num_running: int = 0
    num_cancelled: int = 0
    endpoint: str = ""
    heeds_cancel: bool = True
    cancel_answer: Any = None
    cancelled_ids: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.may_end = asyncio.Event()
        self.may_end.set()
        self._has_cancelled = asyncio.Condition()

    async def ModelStreamInfer(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.num_streams += 1
        self.num_open += 1
        outgoing: asyncio.Queue[Any] = asyncio.Queue()
        taking = asyncio.ensure_future(self._take_all(request_iterator, outgoing))
        try:
            while (answer := await outgoing.get()) is not None:
                yield answer
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            taking.cancel()
            self.num_open -= 1

    async def _take_all(self, request_iterator: Any, outgoing: asyncio.Queue[Any]) -> None:
        running = []
        try:
            async for request in request_iterator:
                self.requests.append(request)
                running.append(asyncio.ensure_future(self._run(request, outgoing)))
            await asyncio.gather(*running)
            outgoing.put_nowait(None)
        finally:
            for task in running:
                task.cancel()

    async def _run(self, request: Any, outgoing: asyncio.Queue[Any]) -> None:
        self.num_running += 1
        try:
            async for answer in self._answers(json.loads(request.raw_input_contents[0][4:])):
                outgoing.put_nowait(_to(request, answer))
            assert request.parameters["triton_enable_empty_final_response"].bool_param
            outgoing.put_nowait(_final(request))
        finally:
            self.num_running -= 1

    async def _answers(self, command: dict[str, Any]) -> AsyncIterator[Any]:
        if command["op"] == "cancel":
            await self._cancel(command["request_id"])
            yield self.cancel_answer
            return
        for answer in self.answers:
            yield answer
        await self._wait_until_over(command.get("request_id", ""))

    async def _cancel(self, request_id: str) -> None:
        if not self.heeds_cancel:
            await asyncio.Event().wait()
        self.cancelled_ids.add(request_id)
        async with self._has_cancelled:
            self._has_cancelled.notify_all()

    async def _wait_until_over(self, request_id: str) -> None:
        async def wait_for_cancel() -> None:
            async with self._has_cancelled:
                await self._has_cancelled.wait_for(lambda: request_id in self.cancelled_ids)

        waits = [asyncio.ensure_future(self.may_end.wait()), asyncio.ensure_future(wait_for_cancel())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def inputs(self, number: int = 0) -> dict[str, Any]:
        """Tensors of a request, decoded."""
        request = self.requests[number]
        return {
            tensor.name: raw[4:] if tensor.datatype == "BYTES" else np.frombuffer(raw, dtype=np.int32)
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }


@contextlib.asynccontextmanager
async def open_triton(*answers: Any, stays_open: bool = False) -> AsyncIterator[tuple[TritonDouble, Any]]:
    """A server and its `grpc.aio.Server`."""
    double = TritonDouble(list(answers))
    if stays_open:
        double.may_end.clear()
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(double, server)
    double.endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield double, server
    finally:
        double.may_end.set()
        await server.stop(None)
