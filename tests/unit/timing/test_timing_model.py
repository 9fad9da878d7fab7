"""The timing model: what each part of a step, a transfer and an onboarding costs."""

import dataclasses

import pytest

from kelp.core.config import MockTimingConfig
from kelp.core.types import Tier
from kelp.timing.model import TimingModel

MODEL = TimingModel(
    step_s=1.0,
    prefill_token_s=0.1,
    attention_pair_s=0.01,
    decode_sequence_s=0.5,
    decode_context_s=0.001,
    transfer_s=2.0,
    transfer_block_s=0.25,
    onboard_s=(0.0, 1.0, 2.0, 3.0),
    onboard_block_s=(0.0, 0.1, 0.2, 0.3),
)


def test_an_empty_step_costs_its_constant():
    assert MODEL.batch_s([], []) == 1.0


def test_a_prompt_costs_its_tokens_and_every_pair_with_an_earlier_one():
    assert MODEL.batch_s([(10, 0)], []) == pytest.approx(1.0 + 10 * 0.1 + 50 * 0.01)
    assert MODEL.batch_s([(10, 100)], []) == pytest.approx(1.0 + 10 * 0.1 + 1050 * 0.01)


def test_a_decoding_sequence_costs_itself_and_what_it_reads():
    assert MODEL.batch_s([], [100, 300]) == pytest.approx(1.0 + 2 * 0.5 + 400 * 0.001)


def test_a_step_is_shared_by_all_that_take_part():
    together = MODEL.batch_s([(10, 0)], [100])
    assert together == pytest.approx(MODEL.prefill_s(10, 0) + MODEL.batch_s([], [100]) - MODEL.step_s)


def test_cutting_a_prompt_costs_a_step_more_and_the_same_attention():
    whole = MODEL.prefill_s(20, 0)
    halves = MODEL.prefill_s(10, 0) + MODEL.prefill_s(10, 10)
    assert halves == pytest.approx(whole + MODEL.step_s)


def test_moving_nothing_costs_nothing():
    assert MODEL.handoff_s(0) == 0.0
    assert MODEL.tier_s(Tier.HOST, 0) == 0.0


def test_moving_blocks_costs_a_constant_and_each_block():
    assert MODEL.handoff_s(4) == 3.0
    assert MODEL.tier_s(Tier.DISK, 10) == 4.0


def test_a_scaled_worker_is_as_many_times_as_slow_at_everything():
    scaled = MODEL.scaled(3.0)
    work = [(7, 3)], [11, 13]
    assert scaled.batch_s(*work) == pytest.approx(3 * MODEL.batch_s(*work))
    assert scaled.handoff_s(5) == pytest.approx(3 * MODEL.handoff_s(5))
    for tier in Tier:
        assert scaled.tier_s(tier, 5) == pytest.approx(3 * MODEL.tier_s(tier, 5))


def test_the_configured_defaults_are_the_models():
    assert MockTimingConfig().model_dump() == dataclasses.asdict(TimingModel())
