"""One gRPC stream to one worker, shared by all requests to it.

Opening a stream costs a router more than a request on an open one does, and Triton takes any number of requests on
one, naming each in what it answers. A stream nobody uses is closed after a moment, because an open one holds up the
shutdown of its server. Knows tensors, not what is in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from kelp.core.errors import KelpError, ProtocolError, WorkerDied, WorkerLost, from_message

RawTensors = Mapping[str, bytes]
"""Contents by output name, as Triton sends them."""

_IDLE_S = 1.0
_CLOSE_TIMEOUT_S = 1.0
_ASK_FOR_FINAL = "triton_enable_empty_final_response"
_FINAL = "triton_final_response"
_REFUSED = "Connection refused"
_DEAD_STUB = re.compile(r"Stub process .* is not healthy")


Take = Callable[[RawTensors | KelpError | None], None]
"""Takes responses in order, and at the end, once, None or the error."""


class Reply:
    """What comes back for one request; belongs to the event loop."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._ended = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        """Whether Triton holds nothing of the request any more."""
        return self._ended.is_set()

    async def wait_ended(self, timeout_s: float) -> bool:
        """Wait for the end; False if it does not come."""
        try:
            await asyncio.wait_for(self._ended.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def put(self, tensors: RawTensors) -> None:
        """A response has come."""
        self._take(tensors)

    def end(self, error: KelpError | None = None) -> None:
        """No further response comes."""
        self._ended.set()
        self._take(error)


class SharedStream:
    """One gRPC call; made on the event loop.

    Args:
        where: Names the worker in errors.

    Attributes:
        is_usable: Whether further requests may start here.
    """

    def __init__(self, stub: Any, where: str) -> None:
        self._where = where
        self._call: Any = stub.ModelStreamInfer()
        self._replies: dict[str, Reply] = {}
        self._outgoing: asyncio.Queue[Any] = asyncio.Queue()
        self.is_usable = True
        self._has_abandoned = False
        self._was_used = True
        self._reading = asyncio.ensure_future(self._read())
        self._writing = asyncio.ensure_future(self._write())
        self._timer = asyncio.get_running_loop().call_later(_IDLE_S, self._check_use)

    @property
    def is_over(self) -> bool:
        """Whether the call has ended."""
        return self._reading.done()

    def start(self, request: Any, take: Take) -> Reply:
        """Send a request, whose id no other one on this stream has."""
        reply = self._replies[request.id] = Reply(take)
        self._was_used = True
        self._outgoing.put_nowait(request)
        return reply

    def abandon(self, request_id: str) -> None:
        """Nobody waits for the request any more, and the worker does not end it.

        The call is cancelled as soon as its other requests have ended: it is the only way to make Triton let go.
        """
        reply = self._replies.pop(request_id, None)
        if reply is None:
            return
        reply.end(WorkerLost(f"{self._where}: did not end the request when asked to"))
        self.is_usable, self._has_abandoned = False, True
        self._cancel_when_left()

    async def close(self) -> None:
        """End the call; requests still open fail with WorkerLost."""
        self._retire()
        await asyncio.wait({self._reading}, timeout=_CLOSE_TIMEOUT_S)
        self._call.cancel()
        self._writing.cancel()
        await asyncio.wait({self._reading, self._writing})

    def _check_use(self) -> None:
        if self._replies or self._was_used:
            self._was_used = False
            self._timer = asyncio.get_running_loop().call_later(_IDLE_S, self._check_use)
        else:
            self._retire()

    def _retire(self) -> None:
        self.is_usable = False
        self._timer.cancel()
        self._outgoing.put_nowait(None)

    def _cancel_when_left(self) -> None:
        if self._has_abandoned and not self._replies:
            self._call.cancel()

    async def _write(self) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while (request := await self._outgoing.get()) is not None:
                await self._call.write(request)
            await self._call.done_writing()

    async def _read(self) -> None:
        error: KelpError = WorkerLost(f"{self._where}: connection broke: the server ended it")
        try:
            async for message in self._call:
                self._take(message)
        except grpc.RpcError as broken:
            details = _details(broken)
            error = (WorkerDied if _REFUSED in details else WorkerLost)(f"{self._where}: connection broke: {details}")
        except asyncio.CancelledError:
            error = WorkerLost(f"{self._where}: connection broke: cancelled")
        finally:
            self.is_usable = False
            self._timer.cancel()
            self._outgoing.put_nowait(None)
            replies, self._replies = self._replies, {}
            for reply in replies.values():
                reply.end(error)

    def _take(self, message: Any) -> None:
        response = message.infer_response
        reply = self._replies.get(response.id)
        if reply is None:
            return
        error = self._typed(message.error_message) if message.error_message else None
        names, contents = [output.name for output in response.outputs], response.raw_output_contents
        if error is None and len(names) != len(contents):
            error = ProtocolError(f"{self._where}: {len(contents)} contents for {len(names)} outputs")
        if error is None and names:
            reply.put(dict(zip(names, contents, strict=True)))
        if error is not None or response.parameters[_FINAL].bool_param:
            del self._replies[response.id]
            reply.end(error)
            self._cancel_when_left()

    def _typed(self, text: str) -> KelpError:
        typed = from_message(text)
        if type(typed) is not WorkerLost:
            return typed
        return (WorkerDied if _DEAD_STUB.search(text) else WorkerLost)(f"{self._where}: {typed.text}")


def _details(error: Any) -> str:
    details = getattr(error, "details", None)
    return str(details()) if callable(details) else str(error)


def infer_request(model_name: str, request_id: str, tensors: Mapping[str, tuple[str, int, bytes]]) -> Any:
    """A request of one-dimensional tensors: `(datatype, number of elements, content)` by name."""
    request = service_pb2.ModelInferRequest(model_name=model_name, id=request_id)
    request.parameters[_ASK_FOR_FINAL].bool_param = True
    for name, (datatype, size, raw) in tensors.items():
        request.inputs.add(name=name, datatype=datatype, shape=(size,))
        request.raw_input_contents.append(raw)
    return request
