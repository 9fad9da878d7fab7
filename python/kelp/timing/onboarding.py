"""What bringing blocks from lower tiers takes, learned from what it took; a prior per tier until then."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kelp.timing.model import TimingModel

_MAX_SURPRISE = 3.0
_NUM_TRUSTED = 4.0
_MIN_GAIN = 0.05
_FACTOR_RANGE = (1e-4, 1e4)


class OnboardingRates:
    """Seconds per onboarding and per block of each tier: the model's, times one factor a tier.

    An onboarding from several tiers is taken to need the sum, and teaches each of them by its share.
    """

    def __init__(self, model: TimingModel) -> None:
        self._fixed_s = np.array(model.onboard_s[1:])
        self._block_s = np.array(model.onboard_block_s[1:])
        self._num_observed = np.zeros(len(self._fixed_s))

    def seconds(self, blocks: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """Predict.

        Args:
            blocks: `[n, num_tiers]`, cumulative as in `router.index.base.Matches`.

        Returns:
            `[n]`.
        """
        per_tier = np.diff(blocks, axis=1)
        seconds: npt.NDArray[np.float64] = per_tier @ self._block_s + (per_tier > 0) @ self._fixed_s
        return seconds

    def observe(self, num_blocks: Sequence[int], seconds: float) -> None:
        """An onboarding took that long; beyond the first few, surprises count at most threefold.

        Args:
            num_blocks: By tier, device first; tiers at the end may be left out. Of none nothing is learned.
            seconds: From asking for the first block to having the last one.
        """
        if not any(num_blocks):
            return
        counts = np.zeros(len(self._block_s))
        counts[: len(num_blocks) - 1] = num_blocks[1:]
        predicted_s = counts * self._block_s + (counts > 0) * self._fixed_s
        total_s = float(predicted_s.sum())
        if total_s <= 0.0 or seconds <= 0.0:
            return
        share = predicted_s / total_s
        ratio = seconds / total_s
        if float(share @ self._num_observed) >= _NUM_TRUSTED:
            ratio = min(max(ratio, 1 / _MAX_SURPRISE), _MAX_SURPRISE)
        factors = np.clip(ratio ** (share * np.maximum(_MIN_GAIN, 1.0 / (self._num_observed + 1.0))), *_FACTOR_RANGE)
        self._fixed_s = self._fixed_s * factors
        self._block_s = self._block_s * factors
        self._num_observed += share
