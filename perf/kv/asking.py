"""One request at a time to `llm`, by token ids, for a worker of choice; and what the block manager counts."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from kelp.core.kv_manager_messages import GetStats, Stats, decode_results, encode_batch
from kelp.core.schema import KV_BLOCK_MANAGER
from perf.serving.client import read_outputs, split_strings
from perf.suite import BenchError

_TIMEOUT_S = 300.0
_CHANNEL_OPTIONS = [("grpc.max_receive_message_length", 64 * 1024 * 1024)]
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a request.

    Attributes:
        ttft_s: From sending it to the first response with a token.
        cached_tokens: Prompt tokens that were not computed.
    """

    ttft_s: float
    cached_tokens: int


def _text(value: str) -> bytes:
    raw = value.encode()
    return _LENGTH.pack(len(raw)) + raw


def make_request(tokens: Sequence[int], worker: str) -> service_pb2.ModelInferRequest:
    """A greedy, streaming request of two tokens; the second keeps the first from being the last response."""
    inputs = (
        ("input_ids", "INT32", len(tokens), struct.pack(f"<{len(tokens)}i", *tokens)),
        ("max_tokens", "INT32", 1, struct.pack("<i", 2)),
        ("stream", "BOOL", 1, b"\x01"),
        ("ignore_eos", "BOOL", 1, b"\x01"),
    )
    request = service_pb2.ModelInferRequest(model_name="llm")
    request.parameters["kelp_worker"].string_param = worker
    for name, datatype, count, raw in inputs:
        request.inputs.add(name=name, datatype=datatype, shape=[count])
        request.raw_input_contents.append(raw)
    return request


class Asker:
    """A connection to one server."""

    def __init__(self, grpc_endpoint: str) -> None:
        self._channel = grpc.insecure_channel(grpc_endpoint, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._channel.close()

    def ask(self, tokens: Sequence[int], worker: str) -> Reply:
        """Send a prompt to a worker.

        Raises:
            BenchError: It was not answered, or by another worker.
        """
        request, first_s, last = make_request(tokens, worker), None, {}
        started_s = time.monotonic()
        try:
            for message in self._stub.ModelStreamInfer(iter([request]), timeout=_TIMEOUT_S):
                if message.error_message:
                    raise BenchError(f"{worker}: {message.error_message}")
                outputs = read_outputs(message.infer_response)
                if first_s is None and outputs.get("output_ids"):
                    first_s = time.monotonic()
                last = outputs or last
        except grpc.RpcError as error:
            raise BenchError(f"{worker}: {error.code().name}: {error.details()}") from None
        if first_s is None:
            raise BenchError(f"{worker}: no token came")
        _require_worker(last, worker)
        return Reply(first_s - started_s, struct.unpack("<i", last["cached_tokens"])[0])

    def manager_stats(self) -> dict[str, float]:
        """What the server's KV block manager counts.

        Raises:
            BenchError: It does not answer.
        """
        raw = encode_batch([GetStats()])
        request = service_pb2.ModelInferRequest(model_name=KV_BLOCK_MANAGER.name)
        request.inputs.add(name=KV_BLOCK_MANAGER.inputs[0].name, datatype="BYTES", shape=[1])
        request.raw_input_contents.append(_LENGTH.pack(len(raw)) + raw)
        try:
            response: Any = self._stub.ModelInfer(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            raise BenchError(f"kv_block_manager: {error.code().name}: {error.details()}") from None
        (result,) = decode_results(response.raw_output_contents[0][_LENGTH.size :])
        if not isinstance(result, Stats):
            raise BenchError(f"kv_block_manager: {result}")
        return result.values


def _require_worker(outputs: dict[str, bytes], worker: str) -> None:
    served = split_strings(outputs.get("worker_ids", b""))
    if len(served) != 1 or worker not in served[0].split("/"):
        raise BenchError(f"{worker} was asked for, {served} served")
