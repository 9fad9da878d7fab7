"""A request with its responses, as the parts above Triton see it.

`kelp_triton.exchange` implements this over Triton; tests implement it over lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt

Tensors = Mapping[str, npt.NDArray[Any]]


class Exchange(Protocol):
    """One request. `send` and `fail` belong to one thread at a time; after the last response they do nothing."""

    def inputs(self) -> Tensors:
        """Input tensors by name; BYTES are object arrays of bytes."""

    def parameters(self) -> Mapping[str, object]:
        """Request parameters beside the tensors."""

    def request_id(self) -> str:
        """The id that the client gave its request; empty without one."""

    def is_cancelled(self) -> bool:
        """Whether the client cancelled or disconnected; may block for a round trip."""

    def send(self, outputs: Tensors, is_final: bool = False) -> None:
        """Send one response."""
