"""What a worker answers through Triton, or whoever has its port now: read by the router's end of a shared stream."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
from tritonclient.grpc import service_pb2

from fuzz.conversations import run_on_loop
from fuzz.examples import COMMAND
from fuzz.parsers import Label, WrongOutcome, check_text
from kelp.client.base import WorkerAddress, WorkerOutput
from kelp.client.grpc.shared_stream import SharedStream
from kelp.client.grpc.workers import GrpcWorkerClient
from kelp.core.errors import KelpError
from kelp.core.messages import Finished
from kelp.core.types import FinishReason
from kelp.core.wire import encode_message

_LENGTH = struct.Struct("<I")
_ADDRESS = WorkerAddress("h:1", "m", "", "e")
_FINAL = "triton_final_response"
_NOT_READ = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
Response = tuple[str, list[str], list[bytes], bool, str]
"""Request id, names of outputs, their contents, whether it is the last one, an error."""


class _Call:
    """A gRPC call that takes everything and answers what it was made with."""

    def __init__(self, messages: list[Any]) -> None:
        self._messages = messages

    async def __aiter__(self) -> AsyncIterator[Any]:
        for message in self._messages:
            yield message

    async def write(self, _: Any) -> None:
        pass

    async def done_writing(self) -> None:
        pass

    def cancel(self) -> None:
        pass


class _Stub:
    def __init__(self, messages: list[Any]) -> None:
        self._messages = messages

    def ModelStreamInfer(self) -> _Call:  # noqa: N802
        return _Call(self._messages)


class _Stream(SharedStream):
    """Keeps what ends its reading; it must be the end of the call, and nothing in it."""

    fault: BaseException | None = None

    async def _read(self) -> None:
        try:
            await super()._read()
        except Exception as error:
            self.fault = error


class _Client(GrpcWorkerClient):
    def __init__(self, messages: list[Any]) -> None:
        super().__init__()
        self.stream = _Stream(_Stub(messages), "worker w")

    def _stream(self, address: WorkerAddress) -> SharedStream:
        return self.stream


def _message(response: Response) -> Any:
    request_id, names, contents, is_last, error = response
    message = service_pb2.ModelStreamInferResponse(error_message=error)
    answer = message.infer_response
    answer.id = request_id
    for name in names:
        answer.outputs.add(name=name)
    answer.raw_output_contents.extend(contents)
    answer.parameters[_FINAL].bool_param = is_last
    return message


def triton_end(raw: bytes) -> object:
    """A stream on which a request and a question for counts are open."""
    try:
        messages = [_message(one) for one in msgspec.msgpack.decode(raw, type=list[Response])]
    except (*_NOT_READ, ValueError):
        return None
    heard: list[str] = []

    def receive(said: WorkerOutput | KelpError | None) -> None:
        if isinstance(said, KelpError):
            check_text(said.text)
        heard.append(type(said).__name__)

    async def feed() -> None:
        client = _Client(messages)
        request = client.generate(_ADDRESS, COMMAND, np.zeros(2, np.int32), receive)
        try:
            heard.append(type(await client.control(_ADDRESS, None)).__name__)
        except KelpError as error:
            heard.append(type(error).__name__)
        while not client.stream.is_over:
            await asyncio.sleep(0)
        if client.stream.fault is not None:
            raise client.stream.fault
        if not request.has_ended:
            raise WrongOutcome("a request was forgotten")

    run_on_loop(feed)
    return Label(" ".join(heard[-8:]))


def _bytes(raw: bytes) -> bytes:
    return _LENGTH.pack(len(raw)) + raw


_IDS, _LOG_PROBS = np.arange(2, dtype="<i4").tobytes(), np.zeros(2, "<f4").tobytes()
_EVENT = _bytes(encode_message(Finished(finish_reason=FinishReason.STOP)))
_NAMES = ["output_ids", "output_log_probs", "event"]
ANSWERS: tuple[list[Response], ...] = (
    [("r", _NAMES[:2], [_IDS, _LOG_PROBS], False, ""), ("r", _NAMES, [b"", b"", _EVENT], True, "")],
    [("control 0", ["event"], [_bytes(b'{"worker":"w"}')], True, ""), ("r", [], [], True, "[KELP_OVERLOADED] full")],
)
