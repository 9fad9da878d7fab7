"""What a simulated fleet does to requests."""

import dataclasses
import gc
import math

import numpy as np
import pytest

from kelp.core.errors import ConfigError
from kelp.sim.contestants import Contestant
from kelp.sim.fleet import Churn, FleetSpec, NetworkSpec, TruthSpec
from kelp.sim.replica import routing_of
from kelp.sim.requests import SimRequest, Workload
from kelp.sim.run import simulate
from kelp.sim.traffic import LOSS_NOTICED_S
from kelp.timing.model import TimingModel
from support.sim_routers import BLOCK_SIZE, TurnTaker, name_of, random_workload

PLAIN = TruthSpec(bias=0.0, noise=0.0, drift=0.0)
NETWORK = NetworkSpec(delay_s=0.001, events_delay_s=0.005)


def prompt(num_blocks: int, family: int = 0) -> tuple:
    return tuple(name_of(family, index) for index in range(num_blocks))


def request(at_s: float, num_blocks: int, num_output: int, family: int = 0) -> SimRequest:
    return SimRequest(at_s, num_blocks * BLOCK_SIZE, num_output, prompt(num_blocks, family))


def run(requests, seed=0, **fleet):
    routers = []

    def routing(clock, router_seed):
        routers.append(TurnTaker(clock, router_seed))
        return routers[-1]

    spec = FleetSpec(**{"truth": PLAIN, "network": NETWORK, "num_blocks": 100, **fleet})
    return simulate(Workload("test", BLOCK_SIZE, requests), spec, routing, seed), routers


def test_a_lone_request_takes_what_the_timing_model_says():
    timing = TimingModel()
    result, _ = run([request(1.0, 10, 5)], num_workers=1, timing=timing)
    prefill_s = timing.prefill_s(160, 0)
    decode_s = sum(timing.batch_s((), [161 + step]) for step in range(4))
    assert result.outcomes[0].first_token_s == pytest.approx(1.0 + 0.001 + prefill_s + 0.001, abs=1e-12)
    assert result.outcomes[0].end_s == pytest.approx(1.0 + 0.001 + prefill_s + decode_s + 0.001, abs=1e-12)
    assert result.busy_share[0] == pytest.approx((prefill_s + decode_s) / result.duration_s)


def test_a_prompt_longer_than_the_step_budget_is_computed_in_chunks():
    timing = TimingModel()
    result, _ = run([request(0.0, 10, 1)], num_workers=1, timing=timing, max_step_tokens=100)
    chunks_s = timing.batch_s([(100, 0)], ()) + timing.batch_s([(60, 100)], ())
    assert result.outcomes[0].first_token_s == pytest.approx(chunks_s + 0.002, abs=1e-12)
    assert result.workers.num_steps[0] == 2


def test_a_repeated_prompt_is_cached_but_for_the_block_with_its_last_token():
    result, _ = run([request(0.0, 10, 3), request(5.0, 10, 3)], num_workers=1)
    assert [outcome.num_cached_tokens for outcome in result.outcomes] == [0, 9 * BLOCK_SIZE]
    assert result.workers.num_cached_tokens[0] == 9 * BLOCK_SIZE


def test_the_router_hears_of_blocks_and_tokens_only_after_the_networks_delay():
    result, (router,) = run([request(0.0, 10, 300)], num_workers=1)
    (key,) = [record.key for record in router.workers]
    assert router.blocks[key] == set(prompt(10))
    (first_s, (_, told)) = next((at_s, about) for at_s, what, about in router.log if what == "first")
    assert first_s == pytest.approx(result.outcomes[0].first_token_s)
    assert told.num_cached_tokens == 0
    assert told.prefill_s == pytest.approx(TimingModel().prefill_s(160, 0))
    assert [about[1] for _, what, about in router.log if what == "progress"] == [128, 128]
    ended = next(about[1] for _, what, about in router.log if what == "ended")
    assert ended.is_completed
    assert ended.num_output_tokens == 300
    assert ended.decode_s == pytest.approx(result.outcomes[0].end_s - result.outcomes[0].first_token_s)


def test_a_disaggregated_request_pays_for_the_blocks_that_the_decode_worker_lacks():
    timing = TimingModel()
    requests = [request(0.0, 10, 5), request(5.0, 10, 5)]
    result, (router,) = run(requests, num_prefill=1, num_decode=1, timing=timing)
    first, second = [about[1] for _, what, about in router.log if what == "first"]
    assert first.transfer_s == pytest.approx(timing.handoff_s(10))
    assert second.transfer_s == 0.0
    assert list(result.table.worker) == [1, 1]
    assert list(result.table.prefill_worker) == [0, 0]
    decode_s = sum(timing.batch_s((), [161 + step]) for step in range(4))
    prefilled_s = 0.001 + timing.prefill_s(160, 0)
    assert result.outcomes[0].first_token_s == pytest.approx(prefilled_s + 0.001)
    assert result.outcomes[0].end_s == pytest.approx(prefilled_s + timing.handoff_s(10) + decode_s + 0.001)


def test_a_request_that_no_worker_could_hold_is_refused():
    result, _ = run([request(0.0, 101, 5), request(0.0, 5, 5)], num_workers=2)
    refused = result.outcomes[0]
    assert (refused.worker, refused.first_token_s, refused.end_s) == (-1, math.inf, math.inf)
    assert result.outcomes[1].worker >= 0


def test_requests_of_a_worker_that_leaves_go_on_elsewhere_with_what_they_have():
    requests = [request(0.0, 10, 500)]
    calm, _ = run(requests, num_workers=2)
    broken, (router,) = run(requests, num_workers=2, churn=[Churn(1.0, 0, False)])
    assert calm.table.worker[0] == 0
    assert broken.table.worker[0] == 1
    assert broken.table.num_attempts[0] == 2
    assert broken.table.first_token_s[0] == calm.table.first_token_s[0]
    assert broken.workers.num_steps.sum() == pytest.approx(calm.workers.num_steps.sum(), abs=2)
    assert broken.table.end_s[0] == pytest.approx(calm.table.end_s[0] + LOSS_NOTICED_S, abs=0.1)
    assert [len(about) for _, what, about in router.log if what == "workers"] == [2, 1]


def test_a_worker_that_joins_late_serves_from_then_on_and_is_new_each_time():
    churn = [Churn(1.0, 1, True), Churn(2.0, 1, False), Churn(4.0, 1, True)]
    requests = [request(at_s, 4, 2) for at_s in (0.0, 0.5, 1.2, 1.4, 4.2, 4.4)]
    result, (router,) = run(requests, num_workers=2, churn=churn)
    assert set(result.table.worker[:2]) == {0}
    assert set(result.table.worker[2:4]) == set(result.table.worker[4:]) == {0, 1}
    keys = {key for _, what, about in router.log if what == "workers" for key in about}
    assert len(keys) == 3


def test_bias_makes_workers_differ_within_its_bounds():
    result, _ = run([request(0.0, 1, 1)], num_workers=50, truth=TruthSpec(bias=0.2))
    assert 0.8 <= result.workers.speed.min() < 0.9
    assert 1.1 < result.workers.speed.max() <= 1.2


@pytest.mark.parametrize("num_routers", [1, 3])
def test_equal_seeds_give_equal_results_to_the_bit_and_other_seeds_others(num_routers):
    workload = random_workload(1, 80, 0.02)
    fleet = FleetSpec(num_workers=4, num_blocks=120, num_routers=num_routers, network=NetworkSpec(events_loss=0.1))
    routing = routing_of(Contestant("kelp"))
    first, second, other = (simulate(workload, fleet, routing, seed) for seed in (5, 5, 6))
    for name in ("worker", "num_cached_tokens", "first_token_s", "end_s"):
        np.testing.assert_array_equal(getattr(first.table, name), getattr(second.table, name))
    for column in dataclasses.fields(first.workers):
        np.testing.assert_array_equal(getattr(first.workers, column.name), getattr(second.workers, column.name))
    assert not np.array_equal(first.table.end_s, other.table.end_s)


def test_progress_is_told_and_the_garbage_collector_is_left_as_it_was():
    heard = []
    workload = random_workload(1, 10)
    routing = routing_of(Contestant("round-robin"))
    simulate(workload, FleetSpec(num_workers=1), routing, 0, lambda arrived, total: heard.append((arrived, total)))
    assert heard[-1] == (10, 10)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, "num_workers"),
        ({"num_prefill": 1}, "num_workers"),
        ({"num_workers": 1, "max_step_tokens": 8, "max_running": 9}, "max_step_tokens"),
        ({"num_workers": 1, "num_routers": 0}, "num_routers"),
        ({"num_workers": 1, "truth": TruthSpec(bias=1.0)}, "truth.bias"),
        ({"num_workers": 1, "network": NetworkSpec(events_loss=1.0)}, "network.events_loss"),
        ({"num_workers": 1, "churn": (Churn(0.0, 1, True),)}, "churn.worker"),
    ],
)
def test_an_impossible_fleet_is_refused_by_the_name_of_its_field(settings, names):
    with pytest.raises(ConfigError, match=names):
        FleetSpec(**settings)


def test_pools_that_wait_for_each_others_blocks_get_on_when_a_lease_ends():
    # Found by the property test: imports hold the decode pool, finished prefills that wait for it the prefill pool.
    fleet = {"num_workers": 1, "num_prefill": 1, "num_decode": 1, "num_blocks": 50, "num_routers": 2}
    result, routers = run(random_workload(2, 25, 0.005).requests, max_step_tokens=16, max_running=5, **fleet)
    assert np.isfinite(result.table.end_s).all()
    assert not any(router.live for router in routers)
    assert (result.table.prefill_worker < 0).any()
