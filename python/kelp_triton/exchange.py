"""One Triton request: its input tensors in, its responses out, exactly one FINAL whatever happens."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from kelp.core.errors import KelpError
from kelp.core.exchange import Tensors


def _triton_error(error: KelpError) -> Any:
    return pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.triton_code))


class Exchange:
    """A decoupled (or sender-answered unary) request.

    `send` may be called from any one thread at a time; after `finish` or `fail` every further call is ignored, so that
    guards may finish without knowing what has happened.
    """

    def __init__(self, request: Any) -> None:
        self._request = request
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()

    def inputs(self) -> dict[str, npt.NDArray[Any]]:
        """All input tensors by name, copied out of shared memory; BYTES are object arrays of bytes."""
        return {tensor.name(): tensor.as_numpy().copy() for tensor in self._request.inputs()}

    def parameters(self) -> dict[str, Any]:
        """Request parameters."""
        return dict(json.loads(self._request.parameters() or "{}"))

    def request_id(self) -> str:
        """The id that the client gave its request; empty without one."""
        return str(self._request.request_id())

    def is_cancelled(self) -> bool:
        """Whether the client cancelled or disconnected; a round trip to the server.

        Never asked after FINAL, nor while it is being sent: Triton frees the response factory then, and asking
        it crashes the whole server (seen with 2.51: SIGSEGV in TRITONBACKEND_ResponseFactoryIsCancelled).
        """
        with self._lock:
            return self._sender is not None and bool(self._sender.is_cancelled())

    def send(self, outputs: Tensors, is_final: bool = False) -> None:
        """Send one response."""
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        self._respond(pb_utils.InferenceResponse(output_tensors=tensors), is_final)

    def fail(self, error: KelpError) -> None:
        """End with a typed error."""
        response = pb_utils.InferenceResponse(output_tensors=[], error=_triton_error(error))
        self._respond(response, True)

    def finish(self) -> None:
        """End without a further response; a no-op when already ended."""
        with self._lock:
            if self._sender is not None:
                self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                self._let_go()

    def _respond(self, response: Any, is_final: bool) -> None:
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_final else 0
        with self._lock:
            if self._sender is None:
                return
            self._sender.send(response, flags=flags)
            if is_final:
                self._let_go()

    def _let_go(self) -> None:
        # Their destructors talk to the server: run after the stub has taken its shared memory down, they crash it.
        self._request = self._sender = None
