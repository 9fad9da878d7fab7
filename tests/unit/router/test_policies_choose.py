"""Each policy over one hand-made cost record."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest

from kelp.core.errors import ConfigError
from kelp.router.decision.costs import Costs
from kelp.router.decision.policies.base import lowest
from kelp.router.decision.policies.catalogue import POLICIES, new_policy


def _costs(num_prompt: int = 160, **columns: object) -> Costs:
    """Two idle workers that are alike, but for the columns given."""
    names = [
        field for field in Costs.__dataclass_fields__ if field not in ("slots", "num_prompt_tokens", "overlap_tiers")
    ]
    fields: dict[str, object] = {name: np.zeros(2) for name in names}
    fields |= {
        "slots": np.arange(2, dtype=np.intp),
        "num_prompt_tokens": float(num_prompt),
        "overlap_tiers": None,
        "is_measured": True,
        "usual_output": 101.0,
        "computes_prompt": True,
        "block_size": np.full(2, 16.0),
        "factor": 1.0,
    }
    for name, value in columns.items():
        fields[name] = np.array(value, float) if isinstance(value, list) else value
    return Costs(**fields)  # type: ignore[arg-type]


def _chosen(policy: str, costs: Costs, count: int = 40, **parameters: float) -> Counter[int]:
    chooser, rng = new_policy(policy, parameters), Random(1)
    return Counter(chooser.choose(costs, rng) for _ in range(count))


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_workers_all_get_their_share(policy: str) -> None:
    chosen = _chosen(policy, _costs(), 200)
    assert min(chosen[0], chosen[1]) >= 70


@pytest.mark.parametrize("policy", ["least-loaded", "power-of-two"])
def test_fewer_requests_win(policy: str) -> None:
    assert _chosen(policy, _costs(active=[3, 2])) == {1: 40}


def test_round_robin_goes_on_where_it_was_when_workers_come_and_go() -> None:
    policy, rng = new_policy("round-robin", {}), Random(0)
    three = _costs()
    three.slots = np.array([0, 1, 2], np.intp)
    assert [policy.choose(three, rng) for _ in range(4)] == [0, 1, 2, 0]
    without_one = _costs()
    without_one.slots = np.array([0, 2], np.intp)
    assert [policy.choose(without_one, rng) for _ in range(2)] == [1, 0]


def test_dynamo_prefers_overlap_to_an_equal_load() -> None:
    assert _chosen("dynamo", _costs(overlap=[0, 5])) == {1: 40}


def test_dynamo_weighs_a_cached_block_like_one_that_decodes() -> None:
    assert _chosen("dynamo", _costs(overlap=[0, 5], kv_tokens=[0, 6 * 16])) == {0: 40}
    assert _chosen("dynamo", _costs(overlap=[0, 5], kv_tokens=[0, 6 * 16]), prefill_load_scale=2.0) == {1: 40}


def test_dynamo_gives_lower_tiers_less_credit() -> None:
    tiers = np.array([[8, 8, 8, 8], [0, 10, 10, 10]], np.int32)
    costs = _costs(overlap=[8, 10], overlap_tiers=tiers)
    assert _chosen("dynamo", costs) == {0: 40}
    costs.overlap_tiers = np.array([[4, 4, 4, 4], [0, 10, 10, 10]], np.int32)
    assert _chosen("dynamo", costs) == {1: 40}


def test_dynamo_ignores_overlap_where_the_prompt_comes_from_a_prefill_worker() -> None:
    assert _chosen("dynamo", _costs(computes_prompt=False, overlap=[0, 9], kv_tokens=[0, 16])) == {0: 40}


def test_sglang_follows_a_long_match_while_queues_are_balanced() -> None:
    assert _chosen("sglang", _costs(overlap=[0, 5], active=[0, 60])) == {1: 40}


def test_sglang_takes_the_shortest_queue_when_they_are_not() -> None:
    assert _chosen("sglang", _costs(overlap=[0, 5], active=[0, 65])) == {0: 40}
    assert _chosen("sglang", _costs(overlap=[0, 5], active=[200, 265])) == {1: 40}


def test_sglang_sends_a_short_match_to_the_smallest_cache() -> None:
    assert _chosen("sglang", _costs(overlap=[0, 3], placed_tokens=[10, 20])) == {0: 40}


def test_kelp_waits_for_the_cache_exactly_as_long_as_it_pays() -> None:
    parameters = {"work_weight": 0.0, "itl_weight": 0.0}
    cached_soon = _costs(queue_s=[0.0, 0.9], ttft_s=[1.0, 0.9])
    cached_late = _costs(queue_s=[0.0, 1.1], ttft_s=[1.0, 1.1])
    assert _chosen("kelp", cached_soon, **parameters) == {1: 40}
    assert _chosen("kelp", cached_late, **parameters) == {0: 40}


def test_kelp_spares_the_prompts_that_a_shorter_one_would_pass() -> None:
    costs = _costs(ttft_s=[0.5, 0.6], hold_up_s=[0.3, 0.0])
    assert _chosen("kelp", costs) == {1: 40}
    assert _chosen("kelp", costs, hold_up_weight=0.0) == {0: 40}


def test_kelp_spares_the_answers_that_a_prompt_would_hold_up() -> None:
    assert _chosen("kelp", _costs(compute_s=[1.0, 1.0], active=[20, 10])) == {1: 40}


def test_kelp_lets_a_request_that_is_prefilled_elsewhere_decode_where_tokens_are_fast() -> None:
    assert _chosen("kelp", _costs(computes_prompt=False, itl_s=[0.03, 0.02])) == {1: 40}


def test_kelp_uses_blocks_before_seconds_are_measured() -> None:
    costs = _costs(is_measured=False, overlap=[0, 5], queue_s=[0.0, 9.0])
    assert _chosen("kelp", costs) == {1: 40}


def test_a_discount_decides_between_otherwise_equal_workers() -> None:
    costs = _costs(active=[2, 2], kv_tokens=[160, 160], ttft_s=[1.0, 1.0], factor=[1.0, 0.8])
    assert {policy: _chosen(policy, costs) for policy in ("kelp", "dynamo", "least-loaded")} == {
        "kelp": {1: 40},
        "dynamo": {1: 40},
        "least-loaded": {1: 40},
    }


def test_temperature_draws_worse_workers_the_less_the_worse_they_are() -> None:
    rng = Random(2)
    drawn = Counter(lowest(np.array([0.0, 0.5, 1.0]), rng, 0.5) for _ in range(3000))
    assert drawn[0] > 1.5 * drawn[1] > 2 * drawn[2] > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_equal_seeds_draw_equally(temperature: float) -> None:
    cost = np.array([1.0, 1.0, 2.0])
    one, other = Random(4), Random(4)
    assert [lowest(cost, one, temperature) for _ in range(50)] == [lowest(cost, other, temperature) for _ in range(50)]


def test_unknown_policies_and_fields_are_named() -> None:
    with pytest.raises(ConfigError, match="'nope' is none of kelp"):
        new_policy("nope", {})
    with pytest.raises(ConfigError, match="dynamo has no 'heat', only overlap_credit"):
        new_policy("dynamo", {"heat": 1.0})


def test_a_configured_temperature_reaches_policies_that_have_one() -> None:
    hot = new_policy("dynamo", {}, temperature=5.0)
    rng = Random(1)
    assert {hot.choose(_costs(overlap=[0, 5]), rng) for _ in range(60)} == {0, 1}
    new_policy("round-robin", {}, temperature=5.0)
