"""Rates are learned from outcomes, and a worker that nobody has measured is as fast as the fleet."""

from __future__ import annotations

import numpy as np
import pytest

from kelp.timing.model import TimingModel
from kelp.timing.rates import Rates, Work

SLOW = TimingModel(step_s=0.05, prefill_token_s=4e-4, attention_pair_s=1e-8, decode_sequence_s=1e-3)


def _seconds(model: TimingModel, work: Work) -> float:
    return (
        work.steps * model.step_s
        + work.tokens * model.prefill_token_s
        + work.pairs * model.attention_pair_s
        + work.sequence_steps * model.decode_sequence_s
        + work.context_steps * model.decode_context_s
    )


def _prompt(tokens: float) -> Work:
    return Work(max(tokens / 2048, 1.0), tokens, tokens * tokens / 2)


def _decode(generator: np.random.Generator) -> Work:
    steps, sequences = generator.uniform(10, 400), generator.uniform(1, 40)
    return Work(steps, 0.0, 0.0, steps * sequences, steps * sequences * 4000)


def _teach(rates: Rates, factors: list[float], rounds: int, noise: float = 0.1) -> None:
    generator = np.random.default_rng(3)
    for _ in range(rounds):
        for slot, factor in enumerate(factors):
            for work in (_prompt(generator.uniform(100, 50_000)), _decode(generator)):
                seconds = _seconds(SLOW, work) * factor * np.exp(noise * generator.standard_normal())
                rates.observe(slot, work, float(seconds))


def _rates(num_slots: int) -> Rates:
    rates = Rates()
    for slot in range(num_slots):
        rates.begin(slot)
    return rates


def test_nothing_is_measured_before_the_first_outcomes() -> None:
    rates = _rates(1)
    assert not rates.is_measured
    _teach(rates, [1.0], 4)
    assert rates.is_measured


@pytest.mark.parametrize("tokens", [500, 5_000, 50_000])
def test_prompts_of_any_length_are_predicted_after_some_noisy_outcomes(tokens: float) -> None:
    rates = _rates(1)
    _teach(rates, [1.0], 200)
    assert rates.seconds(0, _prompt(tokens)) == pytest.approx(_seconds(SLOW, _prompt(tokens)), rel=0.15)


def test_each_worker_has_a_speed_of_its_own() -> None:
    rates = _rates(2)
    _teach(rates, [0.8, 1.2], 200)
    assert rates.slowness[1] / rates.slowness[0] == pytest.approx(1.5, rel=0.1)


def test_a_new_worker_is_as_fast_as_the_fleet() -> None:
    rates = _rates(3)
    _teach(rates, [0.8, 1.2], 200)
    expected = _seconds(SLOW, _prompt(5_000))
    assert rates.seconds(2, _prompt(5_000)) == pytest.approx(expected, rel=0.15)


def test_a_slot_that_is_used_again_forgets_its_worker() -> None:
    rates = _rates(2)
    _teach(rates, [0.5, 1.5], 50)
    rates.begin(1)
    assert rates.slowness[1] == pytest.approx(rates.slowness[0])


def test_a_second_worker_is_as_fast_as_the_first_one() -> None:
    rates = _rates(1)
    _teach(rates, [0.7], 30)
    rates.begin(1)
    assert rates.slowness[1] == pytest.approx(rates.slowness[0])


def test_a_worker_that_slows_down_is_noticed() -> None:
    rates = _rates(2)
    _teach(rates, [1.0, 1.0], 100)
    before = rates.slowness[1] / rates.slowness[0]
    _teach(rates, [1.0, 1.5], 100)
    assert rates.slowness[1] / rates.slowness[0] == pytest.approx(1.5 * before, rel=0.15)


def test_one_hiccup_of_a_thousand_times_moves_predictions_little() -> None:
    rates = _rates(1)
    _teach(rates, [1.0], 200)
    before = rates.seconds(0, _prompt(5_000))
    rates.observe(0, _prompt(5_000), 1000 * before)
    assert rates.seconds(0, _prompt(5_000)) < 1.3 * before


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_outcomes_that_took_no_time_are_ignored(seconds: float) -> None:
    rates = _rates(1)
    rates.observe(0, _prompt(100), seconds)
    assert rates.seconds(0, _prompt(100)) == _rates(1).seconds(0, _prompt(100))


def test_coefficients_stay_positive_whatever_is_observed() -> None:
    rates = _rates(1)
    generator = np.random.default_rng(5)
    for _ in range(500):
        rates.observe(0, _prompt(generator.uniform(1, 1e5)), float(10 ** generator.uniform(-6, 4)))
    coefficients = (rates.step_s, rates.token_s, rates.pair_s, rates.sequence_s, rates.context_s)
    assert all(0 < coefficient < np.inf for coefficient in coefficients)


def test_handoffs_are_learned_apart() -> None:
    rates = _rates(1)
    prior = rates.handoff_s(100)
    for _ in range(40):
        rates.observe_handoff(100, 4 * prior)
    assert rates.is_transfer_measured
    assert rates.handoff_s(100) == pytest.approx(4 * prior, rel=0.05)


def test_onboarding_counts_each_tier_by_its_own_blocks() -> None:
    model = TimingModel()
    blocks = np.array([[4, 4, 4, 4], [0, 10, 10, 10], [1, 1, 6, 8]], np.int32)
    expected = [
        0.0,
        model.onboard_s[1] + 10 * model.onboard_block_s[1],
        model.onboard_s[2] + 5 * model.onboard_block_s[2] + model.onboard_s[3] + 2 * model.onboard_block_s[3],
    ]
    assert _rates(1).onboard_s(blocks).tolist() == pytest.approx(expected)
