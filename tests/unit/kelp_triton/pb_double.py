"""Triton's Python-backend module, as far as the bridge uses it; it exists only inside a stub."""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy.typing as npt

FINAL = 1


class TritonModelException(Exception):
    """What Triton raises."""


@dataclass
class TritonError:
    text: str
    code: str = "UNKNOWN"

    INTERNAL: ClassVar[str] = "INTERNAL"
    INVALID_ARG: ClassVar[str] = "INVALID_ARG"
    NOT_FOUND: ClassVar[str] = "NOT_FOUND"
    UNAVAILABLE: ClassVar[str] = "UNAVAILABLE"
    UNSUPPORTED: ClassVar[str] = "UNSUPPORTED"
    CANCELLED: ClassVar[str] = "CANCELLED"

    def message(self) -> str:
        return self.text


@dataclass
class Tensor:
    tensor_name: str
    array: npt.NDArray[Any]

    def name(self) -> str:
        return self.tensor_name

    def as_numpy(self) -> npt.NDArray[Any]:
        return self.array


@dataclass
class InferenceResponse:
    output_list: list[Tensor] = field(default_factory=list)
    failure: TritonError | None = None

    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.output_list, self.failure = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self.output_list

    def has_error(self) -> bool:
        return self.failure is not None

    def error(self) -> TritonError:
        assert self.failure is not None
        return self.failure


class InferenceRequest:
    """A BLS call; `answer` is what the called model does."""

    answer: ClassVar[Callable[[InferenceRequest], InferenceResponse]]

    def __init__(self, model_name: str, requested_output_names: list[str], inputs: list[Tensor]) -> None:
        self.model_name, self.output_names, self.tensors = model_name, requested_output_names, inputs

    def exec(self) -> InferenceResponse:
        return type(self).answer(self)


class Sender:
    """A response sender. Like Triton's, it must not be touched after FINAL."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse | None] = []
        self.has_ended = threading.Event()
        self.is_gone = False
        self.misuses: list[str] = []

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if self.has_ended.is_set():
            self.misuses.append("send after FINAL")
        self.responses.append(response)
        if flags == FINAL:
            self.has_ended.set()

    def is_cancelled(self) -> bool:
        if self.has_ended.is_set():
            self.misuses.append("is_cancelled after FINAL")
        return self.is_gone

    @property
    def error(self) -> TritonError:
        """Of the last response."""
        last = self.responses[-1]
        assert last is not None
        return last.error()


class Request:
    """A request as Triton hands it to `execute`."""

    def __init__(self, parameters: dict[str, object] | None = None, **inputs: npt.NDArray[Any]) -> None:
        self.sender = Sender()
        self._parameters = parameters
        self._inputs = inputs

    def get_response_sender(self) -> Sender:
        return self.sender

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self._inputs.items()]

    def parameters(self) -> str:
        return "" if self._parameters is None else json.dumps(self._parameters)


class Metric:
    """One series; shows which threads touched it."""

    def __init__(self, labels: dict[str, str], buckets: list[float] | None = None) -> None:
        self.labels, self.buckets = labels, buckets
        self.values: list[tuple[str, float]] = []
        self.threads: set[str] = {threading.current_thread().name}

    def increment(self, value: float) -> None:
        self._note("increment", value)

    def set(self, value: float) -> None:
        self._note("set", value)

    def observe(self, value: float) -> None:
        self._note("observe", value)

    def _note(self, kind: str, value: float) -> None:
        self.threads.add(threading.current_thread().name)
        self.values.append((kind, value))


class MetricFamily:
    """Keeps every family made."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    made: ClassVar[list[MetricFamily]] = []
    refusal: ClassVar[Exception | None] = None

    def __init__(self, name: str, description: str, kind: str) -> None:
        if MetricFamily.refusal is not None:
            raise MetricFamily.refusal
        self.name, self.description, self.kind = name, description, kind
        self.metrics: list[Metric] = []
        MetricFamily.made.append(self)

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Metric:  # noqa: N802
        self.metrics.append(Metric(labels, buckets))
        return self.metrics[-1]


def install() -> None:
    """Make `import triton_python_backend_utils` find this."""
    module = types.ModuleType("triton_python_backend_utils")
    for name in ("TritonModelException", "TritonError", "Tensor", "InferenceResponse", "InferenceRequest"):
        setattr(module, name, globals()[name])
    module.MetricFamily = MetricFamily  # type: ignore[attr-defined]
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]
    sys.modules.setdefault("triton_python_backend_utils", module)


install()
