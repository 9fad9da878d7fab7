"""What onboarding takes is learned per tier, and a prior until then."""

from __future__ import annotations

import numpy as np
import pytest

from kelp.core.types import Tier
from kelp.timing.model import TimingModel
from kelp.timing.onboarding import OnboardingRates

PRIOR = TimingModel()


def _cumulative(*counts: int) -> np.ndarray:
    return np.cumsum([counts], axis=1).astype(np.int32)


def _predicted(rates: OnboardingRates, *counts: int) -> float:
    return float(rates.seconds(_cumulative(*counts))[0])


def test_before_anything_is_measured_the_model_counts_and_device_blocks_are_free() -> None:
    rates = OnboardingRates(PRIOR)
    assert _predicted(rates, 100, 0, 0, 0) == 0.0
    parts = [PRIOR.tier_s(tier, 7) for tier in (Tier.HOST, Tier.DISK, Tier.OBJECT)]
    assert _predicted(rates, 100, 7, 0, 0) == pytest.approx(parts[0])
    assert _predicted(rates, 0, 7, 7, 7) == pytest.approx(sum(parts))


@pytest.mark.parametrize("factor", [0.01, 0.5, 30.0])
def test_a_tier_is_as_fast_as_it_turned_out_and_the_others_stay(factor: float) -> None:
    rates = OnboardingRates(PRIOR)
    for number in range(1, 12):
        rates.observe((0, 0, 10 * number, 0), factor * PRIOR.tier_s(Tier.DISK, 10 * number))
    assert _predicted(rates, 0, 0, 64, 0) == pytest.approx(factor * PRIOR.tier_s(Tier.DISK, 64), rel=0.05)
    assert _predicted(rates, 0, 64, 0, 0) == pytest.approx(PRIOR.tier_s(Tier.HOST, 64))


def test_mixed_onboardings_teach_their_tiers_until_the_sum_is_right() -> None:
    rates = OnboardingRates(PRIOR)
    for _ in range(60):
        rates.observe((5, 40, 40, 0), 0.2)
    assert _predicted(rates, 5, 40, 40, 0) == pytest.approx(0.2, rel=0.05)


def test_one_hiccup_says_little() -> None:
    rates = OnboardingRates(PRIOR)
    for _ in range(20):
        rates.observe((0, 50, 0, 0), 0.01)
    rates.observe((0, 50, 0, 0), 100.0)
    assert _predicted(rates, 0, 50, 0, 0) < 0.011


@pytest.mark.parametrize(("num_blocks", "seconds"), [((), 1.0), ((5, 0, 0, 0), 1.0), ((0, 5, 0, 0), 0.0)])
def test_nothing_is_learned_from_nothing(num_blocks: tuple[int, ...], seconds: float) -> None:
    rates = OnboardingRates(PRIOR)
    rates.observe(num_blocks, seconds)
    assert _predicted(rates, 0, 9, 9, 9) == pytest.approx(_predicted(OnboardingRates(PRIOR), 0, 9, 9, 9))
