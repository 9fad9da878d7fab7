"""What things really take on a simulated worker: the timing model, a secret constant factor, drift and noise.

The duration of a run of steps is a closed form, noise included: the factors of all steps are drawn beforehand, and
kept as sums. So skipping over a thousand steps costs what one step costs, and comes to the same time.
"""

from __future__ import annotations

import math

import numpy as np

from kelp.sim.fleet import TruthSpec

MAX_SPAN_STEPS = 4096
"""Most steps that one closed form covers."""

_DRIFT_PERIOD_S = 10.0
_HOUR_S = 3600.0


class NoiseTable:
    """Factors of `MAX_SPAN_STEPS` steps, mean 1, over and over; workers share them, each from a place of its own."""

    def __init__(self, deviation: float, generator: np.random.Generator) -> None:
        factors = np.exp(deviation * generator.standard_normal(MAX_SPAN_STEPS))
        twice = np.tile(factors / factors.mean(), 2)
        self._factors: list[float] = twice.tolist()
        self._sums: list[float] = [0.0, *np.cumsum(twice).tolist()]
        self._ranked_sums: list[float] = [0.0, *np.cumsum(twice * np.arange(len(twice))).tolist()]

    def seconds(self, step: int, num_steps: int, first_s: float, growth_s: float) -> float:
        """Consecutive steps.

        Args:
            step: Rank of the first one.
            num_steps: At most `MAX_SPAN_STEPS`.
            first_s: What the first one would take without noise.
            growth_s: What each one would take longer than the one before.
        """
        start = step % MAX_SPAN_STEPS
        if num_steps == 1:
            return first_s * self._factors[start]
        end = start + num_steps
        sum_of_factors = self._sums[end] - self._sums[start]
        sum_of_ranks = self._ranked_sums[end] - self._ranked_sums[start]
        return (first_s - growth_s * start) * sum_of_factors + growth_s * sum_of_ranks


class TrueSpeed:
    """How much slower than the timing model one worker is."""

    def __init__(self, spec: TruthSpec, generator: np.random.Generator) -> None:
        self.bias = float(generator.uniform(1 - spec.bias, 1 + spec.bias))
        self.first_step = int(generator.integers(MAX_SPAN_STEPS))
        self._step_deviation = spec.drift * math.sqrt(_DRIFT_PERIOD_S / _HOUR_S)
        self._generator = generator
        self._factors = [self.bias]

    def factor(self, at_s: float) -> float:
        """True durations relative to the timing model, of steps that begin at this time."""
        period = int(at_s / _DRIFT_PERIOD_S)
        while len(self._factors) <= period:
            change = self._step_deviation * self._generator.standard_normal()
            self._factors.append(self._factors[-1] * math.exp(change))
        return self._factors[period]

    def steady_until_s(self, at_s: float) -> float:
        """Until when the factor stays what it is."""
        if not self._step_deviation:
            return math.inf
        return (int(at_s / _DRIFT_PERIOD_S) + 1) * _DRIFT_PERIOD_S
