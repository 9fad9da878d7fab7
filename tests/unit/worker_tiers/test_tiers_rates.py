"""What a worker measures of computing and of onboarding, and what it makes of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from tiers_rig import BLOCK_SIZE, PROMPT, open_rig

from kelp.core.kv_manager_messages import Leased, Onboard, Release, TierRun
from kelp.core.messages import RequestTimings, RequestUsage
from kelp.core.metrics import KV_TIER_MOVED, KV_TIER_SECONDS
from kelp.core.types import FinishReason, Tier
from kelp.executor.base import Completed
from kelp.worker.tiers.onboarding import _by_tier
from kelp.worker.tiers.rates import PrefillFit, Rates
from kelp.worker.tiers.traffic import ReadTraffic
from support.waiting import until

LENGTHS = (512, 2048, 7680)


def took_s(num_tokens: int, num_before: int = 0) -> float:
    """Of SmolLM2 on two cores, about: 0.8 ms a token at 512, 2 ms at 7680."""
    return num_tokens * (0.7e-3 + 3.4e-7 * (num_before + num_tokens / 2))


def linear_s(observed: list[tuple[int, float]], num_tokens: int) -> float:
    return num_tokens * float(np.mean([seconds / length for length, seconds in observed]))


def fitted(lengths: list[int], noise: float = 0.0) -> tuple[PrefillFit, list[tuple[int, float]]]:
    generator = np.random.default_rng(1)
    fit, observed = PrefillFit(), []
    for length in lengths:
        seconds = took_s(length) * float(np.exp(generator.normal(0.0, noise)))
        fit.observe(length, 0, seconds)
        observed.append((length, seconds))
    return fit, observed


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_long_prefixes_are_predicted_better_than_by_a_constant_per_token(noise: float) -> None:
    fit, observed = fitted([256, 512, 1024, 2048, 4096] * 8, noise)
    for length in LENGTHS:
        error = abs(fit.predict(length, 0).seconds / took_s(length) - 1)
        assert error < 0.1 + noise
        assert error < abs(linear_s(observed, length) / took_s(length) - 1) or error < 0.05 + noise / 2
    assert fit.predict(512, 4096).seconds == pytest.approx(took_s(512, 4096), rel=0.1 + noise), "behind a cached prefix"


def test_what_grows_with_the_square_is_told_apart() -> None:
    fit, _ = fitted([256, 512, 1024, 2048, 4096] * 8)
    attention_s = 7680**2 / 2 * 3.4e-7
    assert fit.predict(7680, 0).quadratic_share == pytest.approx(attention_s / took_s(7680), rel=0.1)
    assert fit.predict(64, 0).quadratic_share < 0.05


@pytest.mark.parametrize("lengths", [[512], [512, 512], [512, 530], [512, 500, 520, 505]])
def test_prompts_of_one_length_say_what_a_token_takes_and_no_more(lengths: list[int]) -> None:
    fit, _ = fitted(lengths)
    assert fit.predict(512, 0).seconds == pytest.approx(took_s(512), rel=0.05)
    assert took_s(512) * 15 / 2 < fit.predict(7680, 0).seconds < 2 * took_s(7680)


def test_predictions_are_never_negative_whatever_is_measured() -> None:
    generator = np.random.default_rng(2)
    for _ in range(50):
        fit = PrefillFit()
        for _ in range(int(generator.integers(1, 30))):
            num_tokens, num_before = (int(count) for count in generator.integers(64, 8192, 2))
            fit.observe(num_tokens, num_before, float(np.exp(generator.normal(0.0, 3.0))))
            for length in (1, *LENGTHS):
                prefill = fit.predict(length, int(generator.integers(0, 8192)))
                assert 0 <= prefill.quadratic_share <= 1 and 0 <= prefill.seconds < float("inf")
            shorter, longer = fit.predict(512, 0).seconds, fit.predict(7680, 0).seconds
            assert shorter <= longer, "more tokens take no less"


def test_a_hiccup_counts_threefold_at_most_and_a_change_is_followed() -> None:
    fit, _ = fitted([256, 512, 1024, 2048, 4096] * 8)
    before_s = fit.predict(512, 0).seconds
    fit.observe(512, 0, 1000.0)
    assert fit.predict(512, 0).seconds < 1.5 * before_s
    for _ in range(40):
        for length in (256, 4096):
            fit.observe(length, 0, 4 * took_s(length))
    assert fit.predict(7680, 0).seconds == pytest.approx(4 * took_s(7680), rel=0.15)


def completed(seconds: float, cached_tokens: int = 0, onboarded_blocks: int = 0) -> Completed:
    timings = RequestTimings(first_scheduled_ns=1, prefill_done_ns=1 + int(seconds * 1e9))
    usage = RequestUsage(cached_tokens=cached_tokens, onboarded_blocks=onboarded_blocks)
    return Completed(FinishReason.LENGTH, usage, timings)


def test_prompts_with_onboarded_blocks_or_of_few_tokens_teach_nothing() -> None:
    rates = Rates()
    rates.note_prefill(1024, completed(1.0, 512, onboarded_blocks=32))
    rates.note_prefill(1024, completed(1.0, 1000))
    assert rates.recompute(512) is None and rates.is_worth_asking(1)
    rates.note_prefill(1024, completed(1.0, 512))
    recompute = rates.recompute(512, 512)
    assert recompute is not None and recompute.seconds == pytest.approx(1.0)


def test_asking_that_took_long_is_tried_again_after_enough_prompts_that_did_without() -> None:
    rates = Rates()
    rates.note_prefill(1000, completed(1.0))
    rates.note_call(2.0)
    answers = [rates.is_worth_asking(1000) for _ in range(200)]
    assert answers.index(True) > 100
    assert rates.is_worth_asking(10_000)


def test_the_time_of_reads_is_that_in_which_any_was_under_way() -> None:
    traffic = ReadTraffic()
    traffic.begin(1.0)
    traffic.begin(2.0)
    traffic.end(3.0, 4)
    traffic.end(5.0, 0)
    traffic.begin(8.0)
    traffic.end(9.0, 2)
    assert (traffic.num_blocks, traffic.busy_s) == (6, 5.0)


def test_blocks_are_counted_for_the_tier_that_each_came_from() -> None:
    mixed = (TierRun(Tier.DISK, 2), TierRun(Tier.HOST, 3), TierRun(Tier.OBJECT, 1))
    leased = Leased(6, (), (0, 3, 2, 1), mixed)
    assert _by_tier(leased, 0, 6) == (0, 3, 2, 1)
    assert _by_tier(leased, 0, 3) == (0, 1, 2, 0), "cut short"
    assert _by_tier(leased, 1, 6) == (0, 3, 1, 1), "the first came into the cache meanwhile"
    in_order = Leased(6, (), (0, 3, 2, 1))
    assert _by_tier(in_order, 0, 4) == (0, 3, 1, 0)
    assert _by_tier(in_order, 4, 4) == (0, 0, 0, 0)


def test_the_manager_is_told_how_long_reading_its_memory_took(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, num_workers=2) as (host, (worker, other)):
            await worker.run()
            await worker.stored()
            await other.run()
            await other.quiet()
            releases = [call for call in host.calls if isinstance(call, Release)]
            assert [call.num_read for call in releases if call.num_read] == [3]
            assert all(call.read_s > 0 for call in releases if call.num_read)
            counters, _, observations = host.metrics.take()
            labels = (("direction", "read"), ("tier", "host"))
            assert counters[KV_TIER_MOVED, labels] == 3 * worker.executor.layout.block_bytes
            assert len(observations[KV_TIER_SECONDS, labels]) == 1

    asyncio.run(scenario())


def test_by_default_what_is_slow_to_bring_is_computed_and_what_is_slow_to_compute_is_brought(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, num_workers=2, **{"offload.onboard": "auto"}) as (host, (worker, other)):
            first = await worker.run()
            await worker.stored()
            rates = other.tiers._onboarder._rates
            rates.note_prefill(len(PROMPT) * 8, completed(1e-6 * BLOCK_SIZE))
            rates.note_call(1e-12)
            num_asked = host.num_calls(Onboard)
            computed = await other.run()
            assert host.num_calls(Onboard) == num_asked + 1
            assert isinstance(computed.end, Completed) and computed.end.usage.cached_tokens == 0
            assert computed.tokens == first.tokens
            await other.forget()
            for _ in range(100):
                rates.note_prefill(len(PROMPT) * 8, completed(100.0))
            brought = await other.run()
            await until(lambda: host.held() == (0, 0, 0), "the lease's end")
            assert isinstance(brought.end, Completed) and brought.end.usage.onboarded_blocks == 3
            assert brought.tokens == first.tokens

    asyncio.run(scenario())
