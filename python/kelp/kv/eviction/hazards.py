"""How likely blocks are wanted again, learned from what happens, and what a slot held for them brings.

Blocks of one class are alike; age is time since the last use. Of every age it is counted how many blocks were wanted at
that age and how many lived through it unwanted. The worth of a block is the best rate at which it can bring hits: over
all horizons, the chance that it is wanted before the horizon divided by the time that it is kept until then. This is
the index that is optimal for choosing among independent jobs of unknown length (Gittins, "Bandit processes and dynamic
allocation indices", 1979, section 5); LHD (Beckmann et al., NSDI'18) ranks by the same density over one horizon.

Knows neither blocks nor tiers; times are in epochs of its user.
"""

from __future__ import annotations

from collections.abc import Sequence

_FINE_BINS = 4
"""Bins of one epoch each; after them, two of each power of two, because rates change slowly at great ages."""
_DECAY = 0.97
"""Of all counts per epoch: a turnover of the tier (32 epochs) weighs 0.38 as much as the next."""
_FADING = 0.7
"""Rate in a bin that nothing has been seen of, by the one before: older is worse until shown otherwise."""
_FIRST_RATE = 0.01
"""Per epoch, before anything has been seen."""
_LEAST_RATE, _MOST_RATE = 1e-6, 0.999


class ReuseRates:
    """See the module docstring.

    Args:
        num_classes: Classes are numbered from 0.
        max_age: Ages beyond count as this.
        prior: Blocks seen in a class and bin, for its own rate to count as much as that of all classes.
    """

    def __init__(self, num_classes: int, max_age: int, prior: float) -> None:
        self._max_age = max_age
        self._prior = prior
        self._widths = _widths(max_age)
        self._bins = [number for number, width in enumerate(self._widths) for _ in range(width)]
        num_bins = len(self._widths)
        self._wanted = [[0.0] * num_bins for _ in range(num_classes)]
        self._passed = [[0.0] * num_bins for _ in range(num_classes)]
        self._worth = [[0.0] * num_bins for _ in range(num_classes)]
        self.learn()

    def note_wanted(self, kind: int, age: int) -> None:
        """A block of class `kind` was wanted at this age, whether or not it was there."""
        self._wanted[kind][self._bin(age)] += 1

    def note_passed(self, kind: int, age: int, count: int) -> None:
        """So many blocks have lived through an epoch at this age."""
        self._passed[kind][self._bin(age)] += count

    def worth(self, kind: int, age: int) -> float:
        """Hits per epoch that a slot brings which holds such a block, as `learn` last found."""
        return self._worth[kind][self._bin(age)]

    def learn(self) -> None:
        """An epoch has ended: find the worths anew, let the past count less."""
        common = self._common_rates()
        for kind, (wanted, passed) in enumerate(zip(self._wanted, self._passed, strict=True)):
            rates = [
                _bounded((hits + self._prior * rate) / (hits + misses + self._prior))
                for hits, misses, rate in zip(wanted, passed, common, strict=True)
            ]
            self._worth[kind] = _best_densities(rates, self._widths)
        for row in (*self._wanted, *self._passed):
            row[:] = [count * _DECAY for count in row]

    def _bin(self, age: int) -> int:
        return self._bins[min(age, self._max_age)]

    def _common_rates(self) -> list[float]:
        """By bin, of all classes together."""
        rates, rate = [], _FIRST_RATE
        for number in range(len(self._widths)):
            hits = sum(row[number] for row in self._wanted)
            seen = hits + sum(row[number] for row in self._passed)
            rate = _bounded((hits + _FADING * rate) / (seen + 1))
            rates.append(rate)
        return rates


def _bounded(rate: float) -> float:
    return min(_MOST_RATE, max(_LEAST_RATE, rate))


def _widths(max_age: int) -> list[int]:
    widths = [1] * _FINE_BINS
    width = 2
    while sum(widths) <= max_age:
        widths += [width, width]
        width *= 2
    return widths


def _best_densities(rates: Sequence[float], widths: Sequence[int]) -> list[float]:
    """By bin: chance of a hit over time kept, from the start of the bin to the best horizon."""
    stays = [(1 - rate) ** width for rate, width in zip(rates, widths, strict=True)]
    # Epochs that a block which enters a bin is kept in it, until it is wanted or the bin ends.
    times = [(1 - stay) / rate for stay, rate in zip(stays, rates, strict=True)]
    best = []
    for first in range(len(rates)):
        alive, kept, density = 1.0, 0.0, 0.0
        for stay, time in zip(stays[first:], times[first:], strict=True):
            kept += alive * time
            alive *= stay
            if 1 - alive > density * kept:
                density = (1 - alive) / kept
        best.append(density)
    return best
