"""What a policy is, and how the cheapest of several workers is drawn."""

from __future__ import annotations

from random import Random
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kelp.router.decision.costs import Costs


class CostPolicy(Protocol):
    """Chooses among candidates; may keep a little state of its own, belongs to one event loop."""

    def choose(self, costs: Costs, rng: Random) -> int:
        """Position of one of the candidates, of which there is at least one."""


def lowest(cost: npt.NDArray[np.float64], rng: Random, temperature: float = 0.0) -> int:
    """Position of the lowest cost, ties broken at random.

    Args:
        cost: `[n]`, finite.
        rng: Breaks ties and draws.
        temperature: Above 0, draw with odds `exp(-cost / (range * temperature))`.
    """
    if temperature > 0.0:
        return _softmax(cost, rng, temperature)
    best = int(cost.argmin())
    tied = (cost == cost[best]).nonzero()[0]
    return best if len(tied) == 1 else int(tied[rng.randrange(len(tied))])


def _softmax(cost: npt.NDArray[np.float64], rng: Random, temperature: float) -> int:
    least = float(cost.min())
    spread = float(cost.max()) - least
    if spread <= 0.0:
        return rng.randrange(len(cost))
    odds = np.exp((least - cost) / (spread * temperature)).cumsum()
    return min(int(np.searchsorted(odds, rng.random() * float(odds[-1]), side="right")), len(cost) - 1)
