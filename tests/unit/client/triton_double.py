"""A gRPC server that speaks Triton's protocol and does what a test says."""

from __future__ import annotations

import asyncio
import contextlib
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


@dataclass
class TritonDouble(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers each stream with `answers`, then keeps it open until the test says `hang_up`."""

    answers: list[Any] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    num_cancelled: int = 0
    num_open: int = 0
    endpoint: str = ""

    def __post_init__(self) -> None:
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def ModelStreamInfer(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.num_open += 1
        try:
            async for request in request_iterator:
                self.requests.append(request)
                for answer in self.answers:
                    yield answer
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_open -= 1

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
