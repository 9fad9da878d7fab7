"""What bringing blocks up from each tier takes, learned from what it took, and how much of a prompt it pays for."""

from __future__ import annotations

from collections.abc import Sequence

from kelp.core.types import Tier

_CALL_S = {Tier.DEVICE: 0.0, Tier.HOST: 1e-3, Tier.DISK: 2e-3, Tier.OBJECT: 2e-2}
_BYTES_PER_S = {Tier.DEVICE: 1e10, Tier.HOST: 2e9, Tier.DISK: 1e9, Tier.OBJECT: 2e8}
_MAX_SURPRISE = 3.0
_MIN_GAIN = 0.2


class TierRates:
    """Seconds per call and per block of each tier; one factor a tier is fitted to both, surprises count threefold."""

    def __init__(self, block_bytes: int) -> None:
        self._call_s = dict(_CALL_S)
        self._block_s = {tier: block_bytes / rate for tier, rate in _BYTES_PER_S.items()}
        self._num_observed = dict.fromkeys(Tier, 0)

    def seconds(self, tier: Tier, num_blocks: int) -> float:
        """What one call for so many blocks is predicted to take."""
        return self._call_s[tier] + num_blocks * self._block_s[tier] if num_blocks else 0.0

    def observe(self, tier: Tier, num_blocks: int, seconds: float) -> None:
        """One call took that long."""
        if not num_blocks or seconds <= 0:
            return
        ratio = min(max(seconds / self.seconds(tier, num_blocks), 1 / _MAX_SURPRISE), _MAX_SURPRISE)
        self._num_observed[tier] += 1
        gain = max(_MIN_GAIN, 1 / self._num_observed[tier])
        self._call_s[tier] *= ratio**gain
        self._block_s[tier] *= ratio**gain

    def bring_s(self, tiers: Sequence[Tier]) -> float:
        """Bringing these blocks into a worker: lower tiers at the same time, and all through the host tier."""
        counts = [tiers.count(tier) for tier in Tier]
        below_s = max(self.seconds(tier, counts[tier]) for tier in (Tier.DISK, Tier.OBJECT))
        return self.seconds(Tier.HOST, len(tiers)) + below_s


def num_worth_bringing(tiers: Sequence[Tier], num_asked: int, recompute_s: float, rates: TierRates) -> int:
    """How many leading blocks of a match save most time.

    Both sides are linear within a run of one tier, so only the ends of runs are candidates.

    Args:
        tiers: Where each block of the match lies.
        num_asked: Blocks that `recompute_s` computes.
        recompute_s: 0: bring all.
        rates: What bringing takes.
    """
    if not recompute_s:
        return len(tiers)
    best, best_s = 0, 0.0
    for end in range(1, len(tiers) + 1):
        if end < len(tiers) and tiers[end] is tiers[end - 1]:
            continue
        saved_s = recompute_s * end / num_asked - rates.bring_s(tiers[:end])
        if saved_s >= best_s:
            best, best_s = end, saved_s
    return best
