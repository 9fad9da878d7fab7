"""What lies below a worker: from the decision to the command, and from what the worker tells to the metrics."""

from __future__ import annotations

import numpy as np
import pytest
from router_rig import job, open_router
from router_scenes import PAIR, run, tokens

from kelp.client.base import WorkerOutput
from kelp.core.messages import Progress, RequestTimings, RequestUsage
from kelp.core.metrics import ONBOARDED_TIER_BLOCKS, PREDICTED_TIER_BLOCKS, Metrics
from kelp.core.types import FinishReason, Role
from kelp.router.ledger import Ledger
from kelp.router.placement import Placement
from kelp.router.replicas.loads import OwnLoads
from support.selector_rig import Rig, worker

SECOND_NS = 10**9


def test_the_decision_tells_how_many_blocks_the_computing_worker_has_in_all_tiers_where_all_are_known() -> None:
    rig = Rig([worker("p", Role.PREFILL), worker("d", Role.DECODE)])
    rig.index.tiers = {0: (1, 4, 6, 6), 1: (2, 2, 2, 2)}
    assert rig.selector.select(rig.request()).known_blocks is None
    rig.selector.knows_all_of = lambda slot: slot == 0
    assert rig.selector.select(rig.request()).known_blocks == 6
    assert rig.selector.select(rig.request(), allow_prefill=False).known_blocks is None
    rig.selector.knows_all_of = lambda _: True
    assert rig.selector.select(rig.request(), allow_prefill=False).known_blocks == 2


@pytest.mark.parametrize(
    ("role", "num_generated", "hint"),
    [(Role.AGGREGATED, 0, 5), (Role.PREFILL, 0, 5), (Role.DECODE, 0, None), (Role.AGGREGATED, 1, None)],
)
def test_a_worker_is_told_if_it_computes_a_prompt_whose_blocks_are_all_named(
    role: Role, num_generated: int, hint: int | None
) -> None:
    assert job().command(role, None, num_generated, 5).lower_tier_blocks == hint


def test_the_hint_travels_with_the_request() -> None:
    async def scene() -> None:
        async with open_router(*PAIR) as rig:
            rig.desk.selector.knows_all_of = lambda _: True
            _, request = rig.ask()
            prefill, decode = await rig.workers.stream(0), await rig.workers.stream(1)
            assert (prefill.command.lower_tier_blocks, decode.command.lower_tier_blocks) == (0, None)
            prefill.finish(FinishReason.STOP, *tokens("a"))
            await request

    run(scene)


def test_predicted_and_real_hits_are_counted_by_tier_and_the_time_they_took_is_learned() -> None:
    rig, metrics = Rig([worker("a")]), Metrics()
    rig.index.tiers = {0: (0, 40, 40, 50)}
    ledger = Ledger(rig.selector, OwnLoads("router", 1), "kelp", metrics)
    decision = rig.selector.select(rig.request(960))
    ledger.reserve(decision)
    placement = Placement(decision, ledger, rig.clock)
    placement.sent()
    usage = RequestUsage(cached_tokens=640, onboarded_blocks=40, onboarded_tiers=(0, 40))
    times = RequestTimings(
        arrival_ns=1 * SECOND_NS,
        first_scheduled_ns=2 * SECOND_NS,
        onboard_start_ns=2 * SECOND_NS,
        onboard_done_ns=5 * SECOND_NS,
        first_token_ns=6 * SECOND_NS,
    )
    placement.heard(WorkerOutput((1,), (0.0,), Progress(usage=usage, timings=times)))
    counters, _, _ = metrics.take()
    assert counters[PREDICTED_TIER_BLOCKS, (("tier", "host"),)] == 40
    assert counters[PREDICTED_TIER_BLOCKS, (("tier", "object"),)] == 10
    assert {labels: value for (family, labels), value in counters.items() if family is ONBOARDED_TIER_BLOCKS} == {
        (("tier", "host"),): 40
    }
    explanation = rig.selector.explain(decision.request.request_id)
    assert explanation is not None
    assert (explanation.outcome.prefill_s, explanation.outcome.onboard_s) == (1.0, 3.0)
    forty_of_host = np.array([[0, 40, 40, 40]], np.int32)
    assert rig.selector.rates.onboard_s(forty_of_host).tolist() == pytest.approx([3.0])
    placement.end(is_completed=True)
