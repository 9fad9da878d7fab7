"""`llm` as its users stream from it: one gRPC call per request, closed after it, as a plain client has.

Knows the names and types of the inputs (`core.schema_inputs`), nothing of what they mean.
"""

from __future__ import annotations

import re
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from kelp.client.grpc.shared_stream import infer_request
from kelp.core.schema import LLM
from kelp.core.schema_inputs import LLM_INPUTS_BY_NAME
from kelp.core.schema_types import Datatype

FieldValue = bool | int | float | str | bytes | Sequence[int] | Sequence[str]
"""One element, or all of a tensor of one dimension."""

UNTYPED = "UNTYPED"
"""Code of an error that names none of ours: Triton's own."""

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_FINAL = "triton_final_response"
_NO_ROUTER = re.compile(r"Stub process .* is not healthy|has no available versions")
"""What Triton says while the process of `llm` is dead, or while it is not loaded."""
_CODE = re.compile(r"\[KELP_([A-Z_]+)\]")
_LENGTH = struct.Struct("<I")


class LlmError(Exception):
    """How a request ended instead of being answered.

    Attributes:
        code: Of `core.errors`, `UNTYPED`, or the gRPC status of a call that broke.
        is_connection: The call broke, or no router lives; nobody has said anything about the request.
    """

    def __init__(self, code: str, text: str, is_connection: bool = False) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text
        self.is_connection = is_connection


@dataclass(frozen=True, slots=True)
class LlmResponse:
    """One response; `outputs` holds the raw tensors that came, by name."""

    outputs: Mapping[str, bytes]
    is_last: bool

    @property
    def token_ids(self) -> list[int]:
        """Tokens of this step."""
        ids: list[int] = np.frombuffer(self.outputs.get("output_ids", b""), "<i4").tolist()
        return ids

    @property
    def sequence_index(self) -> int:
        """Which of `num_return_sequences` they belong to."""
        raw = self.outputs.get("sequence_index", b"")
        return int(np.frombuffer(raw, "<i4")[0]) if raw else 0

    @property
    def finish_reason(self) -> str:
        """Empty while the sequence goes on."""
        return next(iter(_strings(self.outputs.get("finish_reason", b""))), "")

    @property
    def worker_ids(self) -> list[str]:
        """On the last response: the workers that answered."""
        return _strings(self.outputs.get("worker_ids", b""))


class LlmClient:
    """Streams from `llm` over one channel; made on the event loop."""

    def __init__(self, endpoint: str) -> None:
        self._channel = grpc.aio.insecure_channel(endpoint, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def close(self) -> None:
        """Close the channel; calls under way break."""
        await self._channel.close(None)

    async def stream(self, fields: Mapping[str, FieldValue], request_id: str = "") -> AsyncIterator[LlmResponse]:
        """Responses as they come; closing the iterator early cancels the request.

        Args:
            fields: Values by the names of `core.schema_inputs`; other names are sent as they would be typed in Python.
            request_id: As `kelp_explain` names it later; empty for one of the server's choice.

        Raises:
            LlmError: The request failed.
        """
        request = infer_request(LLM.name, request_id, {name: _tensor(name, value) for name, value in fields.items()})
        call: Any = self._stub.ModelStreamInfer(iter([request]))
        is_over = False
        try:
            async for message in call:
                if message.error_message:
                    is_over = True
                    raise _served_error(message.error_message)
                response = _response(message.infer_response)
                is_over = response.is_last
                yield response
        except grpc.RpcError as error:
            is_over = True
            raise LlmError(error.code().name, str(error.details()), is_connection=True) from None
        finally:
            # A call that is over is not cancelled: Triton would keep a reference to the model for ever.
            if not is_over:
                call.cancel()
        if not is_over:
            raise LlmError(UNTYPED, "the stream ended without a final response")


def _response(answer: service_pb2.ModelInferResponse) -> LlmResponse:
    names = (output.name for output in answer.outputs)
    outputs = dict(zip(names, answer.raw_output_contents, strict=True))
    return LlmResponse(outputs, answer.parameters[_FINAL].bool_param)


def _served_error(message: str) -> LlmError:
    found = _CODE.search(message)
    return LlmError(
        found.group(1) if found else UNTYPED, message, found is None and _NO_ROUTER.search(message) is not None
    )


def _tensor(name: str, value: FieldValue) -> tuple[str, int, bytes]:
    values: list[Any] = [value] if isinstance(value, bool | int | float | str | bytes) else list(value)
    spec = LLM_INPUTS_BY_NAME.get(name)
    datatype = _guess(values) if spec is None else spec.datatype
    if datatype is Datatype.BYTES:
        raw = [item.encode() if isinstance(item, str) else bytes(item) for item in values]
        return datatype.value, len(values), b"".join(_LENGTH.pack(len(item)) + item for item in raw)
    return datatype.value, len(values), np.array(values, datatype.numpy).tobytes()


def _guess(values: Sequence[object]) -> Datatype:
    by_type = {bool: Datatype.BOOL, int: Datatype.INT32, float: Datatype.FP32}
    return by_type.get(type(values[0]), Datatype.BYTES) if values else Datatype.BYTES


def _strings(raw: bytes) -> list[str]:
    found, position = [], 0
    while position < len(raw):
        (length,) = _LENGTH.unpack_from(raw, position)
        position += _LENGTH.size
        found.append(raw[position : position + length].decode())
        position += length
    return found
