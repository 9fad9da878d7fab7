"""Policies that look at counts alone, or at nothing."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from kelp.router.decision.costs import Costs
from kelp.router.decision.policies.base import lowest


@dataclass(frozen=True, slots=True)
class LeastLoadedPolicy:
    """Fewest active requests."""

    temperature: float = 0.0

    def choose(self, costs: Costs, rng: Random) -> int:
        """See `CostPolicy`."""
        return lowest(costs.active * costs.factor, rng, self.temperature)


@dataclass(frozen=True, slots=True)
class RandomPolicy:
    """Any."""

    def choose(self, costs: Costs, rng: Random) -> int:
        """See `CostPolicy`."""
        return rng.randrange(len(costs))


@dataclass(frozen=True, slots=True)
class PowerOfTwoPolicy:
    """The less loaded one of two drawn at random: good where loads are known late, since nobody herds."""

    def choose(self, costs: Costs, rng: Random) -> int:
        """See `CostPolicy`."""
        if len(costs) == 1:
            return 0
        one, other = rng.sample(range(len(costs)), 2)
        return one if costs.active[one] <= costs.active[other] else other


class RoundRobinPolicy:
    """Each in turn, by slot."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, costs: Costs, rng: Random) -> int:
        """See `CostPolicy`."""
        later = int((costs.slots > self._last).argmax())
        row = later if costs.slots[later] > self._last else 0
        self._last = int(costs.slots[row])
        return row
