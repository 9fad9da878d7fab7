"""A small client of `llm`, on the stock `tritonclient.grpc` stream API."""

from __future__ import annotations

import json
import queue
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton

from kelp.core.schema_inputs import LLM_INPUTS_BY_NAME
from kelp.core.schema_types import Datatype

_TIMEOUT_S = 120.0


class ServedError(Exception):
    """The server's typed error.

    Attributes:
        code: The `<CODE>` of its one `[KELP_<CODE>]` token, empty without one.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        found = re.findall(r"\[KELP_([A-Z_]+)\]", message)
        assert len(found) <= 1, f"more than one token: {message}"
        self.code = found[0] if found else ""


@dataclass(frozen=True)
class Response:
    """One response; `tensors` holds every output that came."""

    tensors: dict[str, npt.NDArray[Any]]
    is_last: bool

    @property
    def text(self) -> str:
        """Decoded strictly: a delta that cuts a character fails the test."""
        return bytes(self.tensors["text_output"][0]).decode()

    @property
    def token_ids(self) -> list[int]:
        return [int(token) for token in self.tensors["output_ids"]]

    @property
    def log_probs(self) -> list[float]:
        return [float(value) for value in self.tensors.get("output_log_probs", ())]

    @property
    def finish_reason(self) -> str:
        return bytes(self.tensors["finish_reason"][0]).decode()

    def number(self, name: str) -> int:
        """A summary tensor of one element."""
        return int(self.tensors[name][0])

    @property
    def worker_ids(self) -> list[str]:
        return [bytes(worker).decode() for worker in self.tensors["worker_ids"]]


@dataclass(frozen=True)
class Answer:
    """All responses of a request."""

    responses: list[Response] = field(default_factory=list)

    @property
    def last(self) -> Response:
        return self.responses[-1]

    @property
    def text(self) -> str:
        return "".join(response.text for response in self.responses)

    @property
    def token_ids(self) -> list[int]:
        return [token for response in self.responses for token in response.token_ids]

    @property
    def log_probs(self) -> list[float]:
        return [value for response in self.responses for value in response.log_probs]


def llm_inputs(fields: dict[str, Any]) -> list[Any]:
    """Tensors for inputs of `llm`; a NumPy array is sent as it is, anything else as the input's declared type."""
    inputs = []
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            array = value
        else:
            spec = LLM_INPUTS_BY_NAME[name]
            values = value if isinstance(value, list | tuple) else [value]
            if spec.datatype is Datatype.BYTES:
                values = [item.encode() if isinstance(item, str) else item for item in values]
            array = np.array(values, dtype=spec.datatype.numpy)
        datatype = "BYTES" if array.dtype == object else triton.np_to_triton_dtype(array.dtype)
        tensor = triton.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


class Call:
    """One streaming request under way; iterate over its responses, or `cancel` it."""

    def __init__(self, endpoint: str, fields: dict[str, Any], model: str = "llm", request_id: str = "") -> None:
        self._events: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._is_over = False
        self._client = triton.InferenceServerClient(endpoint)
        self._client.start_stream(callback=lambda result, error: self._events.put((result, error)))
        self._client.async_stream_infer(
            model, llm_inputs(fields), request_id=request_id, enable_empty_final_response=True
        )

    def __enter__(self) -> Call:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Response]:
        """Responses until the last.

        Raises:
            ServedError: What the server answered instead.
        """
        while True:
            response = self.next()
            if response.tensors:
                yield response
            if response.is_last:
                return

    @property
    def num_waiting(self) -> int:
        """Responses that have come and that nobody has taken."""
        return self._events.qsize()

    def next(self, timeout_s: float = _TIMEOUT_S) -> Response:
        """The next response; `queue.Empty` when none comes in time."""
        result, error = self._events.get(timeout=timeout_s)
        if error is not None:
            self._is_over = True
            raise ServedError(str(error.message()))
        answer = result.get_response()
        tensors = {output.name: result.as_numpy(output.name) for output in answer.outputs}
        self._is_over = answer.parameters["triton_final_response"].bool_param
        return Response(tensors, self._is_over)

    def answer(self) -> Answer:
        """Everything up to the last response."""
        return Answer(list(self))

    def cancel(self) -> None:
        """Cancel what still runs and close the connection; idempotent.

        A stream that is over is not cancelled: Triton would keep a reference to the model, and stop the hard way.
        """
        self._client.stop_stream(cancel_requests=not self._is_over)
        self._client.close()


def ask(endpoint: str, fields: dict[str, Any]) -> Answer:
    """One request to its end over the stream API."""
    with Call(endpoint, fields) as call:
        return call.answer()


def http_post(url: str, body: Any) -> tuple[int, bytes]:
    """Status and body; `body` is JSON unless it is bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
            return reply.status, reply.read()
    except HTTPError as error:
        with error:
            return error.code, error.read()


def is_served(http_url: str, model: str) -> bool:
    """Whether a model is ready; a connection that breaks while its server mends itself says no."""
    try:
        return http_get(f"{http_url}/v2/models/{model}/ready")[0] == 200
    except OSError:
        return False


def http_get(url: str) -> tuple[int, bytes]:
    """Status and body; status 0 while nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as reply:
            return reply.status, reply.read()
    except HTTPError as error:
        with error:
            return error.code, error.read()
    except URLError:
        return 0, b""


def sse_events(body: bytes) -> list[dict[str, Any]]:
    """The JSON documents of a `generate_stream` body."""
    events = [event for event in body.decode().split("\n\n") if event]
    assert all(event.startswith("data: ") for event in events), events
    return [json.loads(event.removeprefix("data: ")) for event in events]


def http_error(body: bytes) -> ServedError:
    """The error that an HTTP body carries."""
    return ServedError(str(json.loads(body)["error"]))
