"""How long a worker may take before its request tries another one."""

from __future__ import annotations

from dataclasses import dataclass

from kelp.core.config import RouterConfig

_TIMES_EXPECTED = 4.0
"""A worker may be this much slower than the router thinks: starting anew elsewhere loses what it has done."""
_LEAST_S = 5.0
"""A shorter wait may be a busy machine's, and a fleet that is behind must not be asked everything twice."""


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


def is_overdue(tokenless_s: float, left_s: float, expected_s: float) -> bool:
    """Whether a request that may go elsewhere should: its worker has needed all the time that is left, and too much.

    Args:
        tokenless_s: Since the worker was asked, or since its latest token.
        left_s: Until the request's deadline.
        expected_s: Predicted time to the first token.
    """
    return tokenless_s >= max(left_s, _LEAST_S, _TIMES_EXPECTED * expected_s)
