"""What bringing blocks up from each tier takes, learned from what it took, and how much of a prompt it pays for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kelp.core.clock import Clock
from kelp.core.types import Tier

_CALL_S = {Tier.DEVICE: 0.0, Tier.HOST: 1e-3, Tier.DISK: 2e-3, Tier.OBJECT: 2e-2}
_BYTES_PER_S = {Tier.DEVICE: 1e10, Tier.HOST: 2e9, Tier.DISK: 1e9, Tier.OBJECT: 2e8}
_MAX_SURPRISE = 3.0
_MIN_GAIN = 0.2
_FACTOR_RANGE = (1e-4, 1e4)
_DOUBT_S = 60.0
"""Nothing is brought from a tier that is believed to be slow, so nothing would show that it no longer is: after so long
without a call, the square root of its factor is believed."""


@dataclass(slots=True)
class _Observed:
    factor: float = 1.0
    num_calls: int = 0
    at_s: float = 0.0


class TierRates:
    """Seconds per call and per block of each tier; one factor a tier is fitted to both, surprises count threefold."""

    def __init__(self, block_bytes: int, clock: Clock) -> None:
        self._clock = clock
        self._block_s = {tier: block_bytes / rate for tier, rate in _BYTES_PER_S.items()}
        self._observed = {tier: _Observed() for tier in Tier}

    def seconds(self, tier: Tier, num_blocks: int) -> float:
        """What one call for so many blocks is predicted to take."""
        if not num_blocks:
            return 0.0
        return self._factor(tier) * (_CALL_S[tier] + num_blocks * self._block_s[tier])

    def observe(self, tier: Tier, num_blocks: int, seconds: float) -> None:
        """One call took that long."""
        expected_s = self.seconds(tier, num_blocks)
        if expected_s <= 0 or seconds <= 0:
            return
        ratio = min(max(seconds / expected_s, 1 / _MAX_SURPRISE), _MAX_SURPRISE)
        observed, factor = self._observed[tier], self._factor(tier)
        observed.num_calls += 1
        gain = max(_MIN_GAIN, 1 / observed.num_calls)
        observed.factor = min(max(factor * ratio**gain, _FACTOR_RANGE[0]), _FACTOR_RANGE[1])
        observed.at_s = self._clock.monotonic_s()

    def bring_s(self, tiers: Sequence[Tier]) -> float:
        """Bringing these blocks into a worker: lower tiers at the same time, and all through the host tier."""
        counts = [tiers.count(tier) for tier in Tier]
        below_s = max(self.seconds(tier, counts[tier]) for tier in (Tier.DISK, Tier.OBJECT))
        return self.seconds(Tier.HOST, len(tiers)) + below_s

    def _factor(self, tier: Tier) -> float:
        observed = self._observed[tier]
        if observed.factor <= 1:
            return observed.factor
        idle_s = self._clock.monotonic_s() - observed.at_s
        return float(observed.factor ** (0.5 ** (idle_s / _DOUBT_S)))


@dataclass(frozen=True, slots=True)
class Recompute:
    """What computing the blocks that were asked for takes.

    Attributes:
        seconds: All `num_blocks` of them; 0 if unknown or of no interest.
        quadratic_share: Of that, what grows with the square of their number.
    """

    num_blocks: int
    seconds: float
    quadratic_share: float = 0.0

    def leading_s(self, num_blocks: int) -> float:
        """Computing the first of them: they have less before them than the rest."""
        part = num_blocks / self.num_blocks
        return self.seconds * part * (1 - self.quadratic_share + self.quadratic_share * part)


def num_worth_bringing(tiers: Sequence[Tier], recompute: Recompute, rates: TierRates) -> int:
    """How many leading blocks of a match save most time.

    Bringing is linear within a run of one tier and what it saves convex, so only the ends of runs are candidates.

    Args:
        tiers: Where each block of the match lies.
        recompute: What computing would take; if unknown, all are brought.
        rates: What bringing takes.
    """
    if not recompute.seconds:
        return len(tiers)
    best, best_s = 0, 0.0
    for end in range(1, len(tiers) + 1):
        if end < len(tiers) and tiers[end] is tiers[end - 1]:
            continue
        saved_s = recompute.leading_s(end) - rates.bring_s(tiers[:end])
        if saved_s >= best_s:
            best, best_s = end, saved_s
    return best
