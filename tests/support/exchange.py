"""`core.exchange.Exchange` over lists."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kelp.core.exchange import Tensors


class FakeExchange:
    """A request whose responses are kept; like Triton's, it ignores what comes after the last one."""

    def __init__(
        self,
        inputs: Mapping[str, npt.NDArray[Any]],
        parameters: Mapping[str, object] | None = None,
        request_id: str = "",
    ) -> None:
        self._inputs = dict(inputs)
        self._request_id = request_id
        self._parameters = dict(parameters or {})
        self._lock = threading.Lock()
        self._is_cancelled = threading.Event()
        self.responses: list[dict[str, npt.NDArray[Any]]] = []
        self.num_final = 0

    def inputs(self) -> Tensors:
        return self._inputs

    def parameters(self) -> Mapping[str, object]:
        return self._parameters

    def request_id(self) -> str:
        return self._request_id

    def is_cancelled(self) -> bool:
        return self._is_cancelled.is_set()

    def send(self, outputs: Tensors, is_final: bool = False) -> None:
        with self._lock:
            if self.num_final:
                return
            self.responses.append(dict(outputs))
            self.num_final += is_final

    def cancel(self) -> None:
        """The client goes."""
        self._is_cancelled.set()

    @property
    def is_over(self) -> bool:
        return self.num_final == 1

    @property
    def token_ids(self) -> list[int]:
        """All tokens sent so far."""
        return [int(token) for response in self.responses for token in response["output_ids"]]

    @property
    def text(self) -> str:
        """All text sent so far."""
        return b"".join(response["text_output"][0] for response in self.responses).decode()

    @property
    def finish_reason(self) -> str:
        """Of the last response."""
        return self.responses[-1]["finish_reason"][0].decode()


def bytes_tensor(value: str | bytes) -> npt.NDArray[Any]:
    """One BYTES element."""
    return np.array([value.encode() if isinstance(value, str) else value], dtype=np.object_)
