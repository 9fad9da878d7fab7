"""Percentiles, and ratios of interleaved pairs with their uncertainty.

The machines are noisy and shared, so a single figure says little: a reference is measured in turn with what it is
compared to, and the spread of the pairs is reported with the ratio.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

MIN_PAIRS = 5
"""Fewer pairs than this give no interval worth printing."""

_RESAMPLES = 2000
_SEED = 20261121


@dataclass(frozen=True, slots=True)
class Pair:
    """One measurement and its reference, taken one after the other."""

    value: float
    reference: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """Geometric mean of the pairs' ratios and its bootstrap 95 % interval; above 1 is better."""

    value: float
    low: float
    high: float


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` (0..1) of the values lie, interpolated linearly.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("percentile: no values")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def median(values: Sequence[float]) -> float:
    """The middle value; see `percentile`."""
    return percentile(values, 0.5)


def paired_ratio(pairs: Sequence[Pair], is_lower_better: bool) -> Ratio | None:
    """How much better than the reference the pairs are.

    The interval resamples whole pairs, so that what disturbs both sides of a pair cancels out. The same pairs always
    give the same interval.

    Returns:
        None with fewer than `MIN_PAIRS` pairs, or where a figure is not a positive number.
    """
    if len(pairs) < MIN_PAIRS or not all(_is_positive(pair) for pair in pairs):
        return None
    sign = -1.0 if is_lower_better else 1.0
    logs = [sign * math.log(pair.value / pair.reference) for pair in pairs]
    generator = random.Random(_SEED)
    means = [math.fsum(generator.choices(logs, k=len(logs))) / len(logs) for _ in range(_RESAMPLES)]
    return Ratio(
        value=math.exp(math.fsum(logs) / len(logs)),
        low=math.exp(percentile(means, 0.025)),
        high=math.exp(percentile(means, 0.975)),
    )


def _is_positive(pair: Pair) -> bool:
    return all(math.isfinite(figure) and figure > 0 for figure in (pair.value, pair.reference))
