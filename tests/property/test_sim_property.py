"""Skipping over steps changes nothing, whatever comes to whichever fleet."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kelp.sim.fleet import Churn, FleetSpec, NetworkSpec, TruthSpec
from kelp.sim.result import SimResult
from kelp.sim.run import simulate
from support.examples import examples
from support.sim_routers import TurnTaker, random_workload

fleets = st.builds(
    FleetSpec,
    num_workers=st.integers(1, 3),
    num_prefill=st.integers(0, 2),
    num_decode=st.integers(0, 2),
    num_blocks=st.sampled_from([50, 64, 100, 300]),
    max_step_tokens=st.sampled_from([16, 100, 512]),
    max_running=st.sampled_from([2, 5, 16]),
    truth=st.builds(
        TruthSpec,
        bias=st.sampled_from([0.0, 0.2]),
        noise=st.sampled_from([0.0, 0.1]),
        drift=st.sampled_from([0.0, 1.0]),
    ),
    network=st.builds(NetworkSpec, events_loss=st.sampled_from([0.0, 0.3])),
    num_routers=st.integers(1, 2),
)


def run(fleet: FleetSpec, seed: int, gap_s: float, may_skip: bool) -> tuple[SimResult, list[TurnTaker]]:
    routers: list[TurnTaker] = []

    def routing(clock, router_seed):
        routers.append(TurnTaker(clock, router_seed))
        return routers[-1]

    return simulate(random_workload(seed, 25, gap_s), fleet, routing, seed, may_skip=may_skip), routers


def assert_same(left: SimResult, right: SimResult) -> None:
    for name in ("worker", "prefill_worker", "num_cached_tokens", "num_attempts"):
        np.testing.assert_array_equal(getattr(left.table, name), getattr(right.table, name))
    for name in ("num_steps", "num_requests", "num_prompt_tokens", "num_cached_tokens", "num_preemptions"):
        np.testing.assert_array_equal(getattr(left.workers, name), getattr(right.workers, name))
    np.testing.assert_allclose(left.table.first_token_s, right.table.first_token_s, rtol=0, atol=1e-9)
    np.testing.assert_allclose(left.table.end_s, right.table.end_s, rtol=0, atol=1e-9)
    np.testing.assert_allclose(left.workers.busy_s, right.workers.busy_s, rtol=0, atol=1e-9)


@settings(max_examples=examples(20), deadline=None)
@given(fleet=fleets, seed=st.integers(0, 10**6), gap_s=st.sampled_from([0.005, 0.05, 0.5]), is_churning=st.booleans())
def test_skipping_over_steps_gives_the_same_decisions_and_times_as_taking_each(fleet, seed, gap_s, is_churning):
    if is_churning:
        fleet = dataclasses.replace(fleet, churn=[Churn(gap_s * 6, 0, False), Churn(gap_s * 12, 0, True)])
    (skipped, skipped_routers), (stepped, stepped_routers) = (
        run(fleet, seed, gap_s, True),
        run(fleet, seed, gap_s, False),
    )
    assert_same(skipped, stepped)
    for left, right in zip(skipped_routers, stepped_routers, strict=True):
        assert left.blocks == right.blocks
        assert [(what, about) for _, what, about in left.log if what == "workers"] == [
            (what, about) for _, what, about in right.log if what == "workers"
        ]
        assert [what for _, what, _ in left.log] == [what for _, what, _ in right.log]
        np.testing.assert_allclose([at for at, _, _ in left.log], [at for at, _, _ in right.log], rtol=0, atol=1e-9)


@settings(max_examples=examples(20), deadline=None)
@given(fleet=fleets, seed=st.integers(0, 10**6), gap_s=st.sampled_from([0.005, 0.05, 0.5]))
def test_every_request_ends_and_no_router_remembers_any(fleet, seed, gap_s):
    result, routers = run(fleet, seed, gap_s, True)
    assert np.isfinite(result.table.end_s).all()
    assert (result.table.worker >= 0).all()
    assert not any(router.live for router in routers)
    assert result.workers.num_requests.sum() >= len(result.table)
