"""How long a worker may take before its request tries another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kelp.core.config import RouterConfig

_TIMES_EXPECTED = 4.0
"""A worker may be this much slower than the router thinks: starting anew elsewhere loses what it has done."""
_LEAST_S = 5.0
"""A shorter wait may be a busy machine's, and a fleet that is behind must not be asked everything twice."""

_MAX_ABSENCE_WAITERS = 256


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a worker may take, seconds.

    Attributes:
        silence_s: Without saying anything, keep-alives included.
        first_token_s: From being asked to its first token.
        next_token_s: From one token to the next, or to the end.
    """

    silence_s: float
    first_token_s: float
    next_token_s: float

    @classmethod
    def of(cls, config: RouterConfig) -> Patience:
        """As configured."""
        return cls(config.idle_timeout_s, config.first_token_timeout_s, config.next_token_timeout_s)


class Absence:
    """New requests that wait for a worker where there is none; a limited number, as each looks again and again.

    Args:
        wait_s: How long one may.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._num_waiting = 0

    @property
    def wait_s(self) -> float:
        """How long one more may; 0 where too many do."""
        return self._wait_s if self._num_waiting < _MAX_ABSENCE_WAITERS else 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """One of them does."""
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1


def is_overdue(tokenless_s: float, left_s: float, expected_s: float) -> bool:
    """Whether a request that may go elsewhere should: its worker has needed all the time that is left, and too much.

    Args:
        tokenless_s: Since the worker was asked, or since its latest token.
        left_s: Until the request's deadline.
        expected_s: Predicted time to the first token.
    """
    return tokenless_s >= max(left_s, _LEAST_S, _TIMES_EXPECTED * expected_s)
