"""A request with its responses, as the parts above Triton see it.

`kelp_triton.exchange` implements this over Triton; tests implement it over lists.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt

from kelp.core.errors import InternalError, KelpError

_log = logging.getLogger(__name__)
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


def as_kelp_error(error: BaseException) -> KelpError:
    """The typed form of anything that reached the outermost guard of a request."""
    if isinstance(error, KelpError):
        return error
    _log.error("unexpected error", exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}")
