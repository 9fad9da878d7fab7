"""In which order workers compute the prompts that wait there: learned, since engines differ and don't tell.

Some compute them as they came. Others share each step among them (`executor.batching.shares`): there a short prompt
passes the long ones before it, and delays them.
"""

from __future__ import annotations

from typing import NamedTuple

_FORGETTING = 0.998
_PRIOR_WEIGHT_S2 = 1.0
_PRIOR = 0.5


class Waits(NamedTuple):
    """What was predicted of one prompt, in seconds.

    Attributes:
        own_s: Its own computation, onboarding included.
        in_order_s: Its wait if prompts are computed in order of arrival,
        shared_s: and if they share the steps.
    """

    own_s: float
    in_order_s: float
    shared_s: float


class PromptOrder:
    """Where between the two predictions waits are: least squares over the latest ones; belongs to one event loop.

    Attributes:
        in_order: 1: in order of arrival, 0: shared.
    """

    def __init__(self) -> None:
        self.in_order = _PRIOR
        self._weight_s2 = _PRIOR_WEIGHT_S2
        self._sum_s2 = _PRIOR * _PRIOR_WEIGHT_S2

    def observe(self, waits: Waits, ttft_s: float) -> None:
        """A prompt took that long until its first token; where the predictions agree, that tells nothing."""
        apart_s = waits.in_order_s - waits.shared_s
        if apart_s <= 0.0:
            return
        waited = min(max(ttft_s - waits.own_s - waits.shared_s, -apart_s), 2.0 * apart_s)
        self._weight_s2 = _FORGETTING * self._weight_s2 + apart_s * apart_s
        self._sum_s2 = _FORGETTING * self._sum_s2 + waited * apart_s
        self.in_order = min(max(self._sum_s2 / self._weight_s2, 0.0), 1.0)
