"""How fast workers are, learned from what their requests took.

One linear model for the fleet (`timing.model`'s shape: steps, prompt tokens, attention pairs, decoding sequences, their
context), fitted by recursive least squares on relative errors with slow forgetting, times one slowness factor per
worker. A worker that nobody has measured is as fast as the fleet; a fleet that nobody has measured is as fast as the
prior says, and `is_measured` tells whoever would rather not trust that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from kelp.timing.model import TimingModel
from kelp.timing.onboarding import OnboardingRates

Seconds = npt.NDArray[np.float64]

_MIN_OBSERVATIONS = 8
_MAX_SURPRISE = 3.0
_NOISE = 0.04
_FITTED_ALL = 256
_FITTED_EVERY = 4
_FORGETTING = 0.999
_PRIOR_VARIANCE = 0.25
_MAX_VARIANCE = 4.0
_FACTOR_RANGE = (0.02, 50.0)
_SLOWNESS_RANGE = (0.1, 10.0)
_MIN_GAIN = 0.03
_PULL_TO_FLEET = 0.001


class Work(NamedTuple):
    """What a stretch of a worker's time was spent on; the features of the model.

    Attributes:
        steps: Engine steps.
        tokens: Prompt tokens computed.
        pairs: Attention pairs of those.
        sequence_steps: Decoding sequences, summed over the steps.
        context_steps: Tokens of KV that decoding sequences read, summed over the steps.
    """

    steps: float
    tokens: float = 0.0
    pairs: float = 0.0
    sequence_steps: float = 0.0
    context_steps: float = 0.0


class Rates:
    """Coefficients of the fleet and slowness of each slot; belongs to one event loop.

    Attributes:
        step_s: Of the fleet, as the next four: see `TimingModel`, whose fields they are.
        token_s: `prefill_token_s`.
        pair_s: `attention_pair_s`.
        sequence_s: `decode_sequence_s`.
        context_s: `decode_context_s`.
        slowness: `[num_slots] float64`, factors of those.
    """

    def __init__(self, prior: TimingModel | None = None) -> None:
        model = prior or TimingModel()
        self._prior = np.array(
            [
                model.step_s,
                model.prefill_token_s,
                model.attention_pair_s,
                model.decode_sequence_s,
                model.decode_context_s,
            ]
        )
        self._model = model
        self._onboarding = OnboardingRates(model)
        self._factors = np.ones(5)
        self._covariance = np.eye(5) * _PRIOR_VARIANCE
        self._num_observed = 0
        self._num_transfers = 0
        self._transfer_factor: float = 1.0
        self._observed_of: list[int] = []
        self.slowness = np.ones(0)
        self.step_s = self.token_s = self.pair_s = self.sequence_s = self.context_s = 0.0
        self._take_factors()

    @property
    def is_measured(self) -> bool:
        """Whether enough has been observed to predict seconds."""
        return self._num_observed >= _MIN_OBSERVATIONS

    @property
    def is_transfer_measured(self) -> bool:
        """Whether enough handoffs have been observed to predict their seconds."""
        return self._num_transfers >= _MIN_OBSERVATIONS

    def begin(self, slot: int) -> None:
        """A worker that nothing is known of has this slot now."""
        missing = slot + 1 - len(self.slowness)
        if missing > 0:
            self.slowness = np.concatenate([self.slowness, np.ones(missing)])
            self._observed_of.extend([0] * missing)
        self._observed_of[slot] = 0
        # Not 1: what all workers have in common may be in their factors as well as in the coefficients.
        measured = np.array(self._observed_of) > 0
        self.slowness[slot] = math.exp(float(np.log(self.slowness[measured]).mean())) if measured.any() else 1.0

    def seconds(self, slot: int, work: Work) -> float:
        """What this work would take there."""
        return float(self.slowness[slot]) * self._fleet_s(work)

    def observe(self, slot: int, work: Work, seconds: float) -> None:
        """This work took that long there. Surprises count at most threefold: one hiccup says little."""
        if seconds <= 0:
            return
        fleet_s = self._fleet_s(work)
        slowness = float(self.slowness[slot])
        if self._num_observed < _MIN_OBSERVATIONS // 2:
            self._rescale(seconds / (slowness * fleet_s))
            fleet_s = self._fleet_s(work)
        ratio = min(max(seconds / (slowness * fleet_s), 1 / _MAX_SURPRISE), _MAX_SURPRISE)
        if self._num_observed < _FITTED_ALL or self._num_observed % _FITTED_EVERY == 0:
            self._fit(work, ratio * fleet_s)
        gain = max(_MIN_GAIN, 1.0 / (self._observed_of[slot] + 4))
        log_slowness = math.log(slowness) * (1 - _PULL_TO_FLEET) + gain * math.log(ratio)
        self.slowness[slot] = min(max(math.exp(log_slowness), _SLOWNESS_RANGE[0]), _SLOWNESS_RANGE[1])
        self._observed_of[slot] += 1
        self._num_observed += 1

    @overload
    def handoff_s(self, num_blocks: float) -> float: ...

    @overload
    def handoff_s(self, num_blocks: Seconds) -> Seconds: ...

    def handoff_s(self, num_blocks: float | Seconds) -> float | Seconds:
        """KV of so many blocks from one worker to another."""
        return self._transfer_factor * (self._model.transfer_s + num_blocks * self._model.transfer_block_s)

    def observe_handoff(self, num_blocks: float, seconds: float) -> None:
        """A handoff took that long."""
        ratio = min(max(seconds / self.handoff_s(num_blocks), 1 / _MAX_SURPRISE), _MAX_SURPRISE)
        self._transfer_factor *= ratio ** max(_MIN_GAIN, 1 / (self._num_transfers + 1))
        self._num_transfers += 1

    def onboard_s(self, blocks: npt.NDArray[np.int32]) -> Seconds:
        """Onboarding from lower tiers; see `OnboardingRates.seconds`."""
        return self._onboarding.seconds(blocks)

    def observe_onboarding(self, num_blocks: Sequence[int], seconds: float) -> None:
        """An onboarding took that long; see `OnboardingRates.observe`."""
        self._onboarding.observe(num_blocks, seconds)

    def _take_factors(self) -> None:
        """Coefficients as plain floats: they are read far more often than they change."""
        self.step_s, self.token_s, self.pair_s, self.sequence_s, self.context_s = (self._prior * self._factors).tolist()

    def _fleet_s(self, work: Work) -> float:
        return (
            work.steps * self.step_s
            + work.tokens * self.token_s
            + work.pairs * self.pair_s
            + work.sequence_steps * self.sequence_s
            + work.context_steps * self.context_s
        )

    def _rescale(self, ratio: float) -> None:
        self._factors = np.clip(self._factors * math.sqrt(ratio), *_FACTOR_RANGE)
        self._take_factors()

    def _fit(self, work: Work, seconds: float) -> None:
        features: Seconds = np.array(work) * self._prior / seconds
        spread = self._covariance @ features
        gain = spread / (_NOISE + float(features @ spread))
        error = 1.0 - float(features @ self._factors)
        self._factors = np.clip(self._factors + gain * error, *_FACTOR_RANGE)
        covariance = (self._covariance - np.outer(gain, spread)) / _FORGETTING
        largest = float(covariance.diagonal().max())
        self._covariance = covariance * (_MAX_VARIANCE / largest) if largest > _MAX_VARIANCE else covariance
        self._take_factors()
