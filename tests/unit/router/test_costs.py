"""What a request would cost at each candidate, from what is known of it."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from kelp.core.types import Role
from kelp.router.decision.costs import Costs
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.selector import Ended, FirstToken
from support.selector_rig import Rig, hashes, worker


def _costs(rig: Rig, request: RoutingRequest) -> Costs:
    way = rig.selector.select(request).way
    assert way is not None
    return way.choices[0].costs


def test_overlap_leaves_less_to_compute_but_always_one_token() -> None:
    rig = Rig([worker("a"), worker("b"), worker("c")])
    names = hashes(*range(10))
    rig.index.blocks = {1: set(names[:4]), 2: set(names)}
    costs = _costs(rig, rig.request(160, block_hashes=names))
    assert costs.overlap.tolist() == [0, 4, 10]
    assert costs.uncached.tolist() == [160, 96, 1]
    assert costs.prefill_s[0] > costs.prefill_s[1] > costs.prefill_s[2] > 0


def test_lower_tiers_spare_computation_and_cost_onboarding() -> None:
    rig = Rig([worker("a"), worker("b")])
    rig.index.tiers = {0: (10, 10, 10, 10), 1: (0, 10, 10, 10)}
    costs = _costs(rig, rig.request(320))
    assert costs.uncached.tolist() == [160, 160]
    assert costs.onboard_s[0] == 0.0
    assert costs.ttft_s[1] - costs.ttft_s[0] == pytest.approx(costs.onboard_s[1])


def test_before_anything_is_measured_all_that_lies_below_is_used() -> None:
    rig = Rig([worker("a")])
    rig.index.tiers = {0: (0, 2, 2, 10)}
    costs = _costs(rig, rig.request(320))
    assert costs.uncached.tolist() == [160]
    assert costs.onboarded(0) == (0, 2, 0, 8)


def test_a_tier_from_which_blocks_come_slower_than_they_are_computed_is_left_out() -> None:
    rig = Rig([worker("a"), worker("b"), worker("c")])
    rig.learn()
    rig.index.tiers = {0: (10, 40, 40, 41), 1: (0, 0, 60, 60), 2: (5, 5, 5, 5)}
    for _ in range(8):
        rig.selector.rates.observe_onboarding((0, 0, 0, 1), 10.0)
        rig.selector.rates.observe_onboarding((0, 50, 50, 0), 1e-4)
    costs = _costs(rig, rig.request(16 * 100))
    assert [costs.onboarded(row) for row in range(3)] == [(0, 30, 0, 0), (0, 0, 60, 0), ()]
    assert costs.overlap.tolist() == [41, 60, 5]
    assert costs.uncached.tolist() == [960, 640, 1520]
    assert costs.onboard_s.max() < 0.1


def test_a_worker_that_computes_no_prompt_has_no_use_for_what_lies_below_it() -> None:
    rig = Rig([worker("p", Role.PREFILL), worker("d", Role.DECODE)])
    rig.index.tiers = {0: (0, 8, 8, 8), 1: (2, 8, 8, 8)}
    way = rig.selector.select(rig.request(160)).way
    assert way is not None
    assert way.transfer_blocks == 8
    assert way.onboarded_blocks == (0, 8, 0, 0)


def test_the_queue_shrinks_while_its_head_is_computed_but_not_beyond_it() -> None:
    rig = Rig([worker("a")])
    for _ in range(2):
        rig.place(rig.request(20_000))
    waits = []
    for seconds in (0.0, 0.5, 1e4):
        rig.clock.advance(seconds)
        for request_id in ("r1", "r2"):
            rig.selector.progress(request_id, 1)
        waits.append(float(_costs(rig, rig.request()).in_order_s[0]))
    assert waits[1] == pytest.approx(waits[0] - 0.5)
    assert waits[2] == pytest.approx(waits[0] / 2)


def test_a_computed_prompt_no_longer_queues() -> None:
    rig = Rig([worker("a")])
    rig.place(rig.request(20_000))
    rig.selector.first_token("r1", FirstToken(0, 0.0, 1.0))
    assert _costs(rig, rig.request()).queue_s.tolist() == [0.0]


def test_an_idle_worker_costs_the_same_whether_another_one_is_busy_or_not() -> None:
    rigs = [Rig([worker("a"), worker("b")]) for _ in range(2)]
    for rig in rigs:
        rig.learn()
    rigs[1].place(rigs[1].request(20_000, pinned_worker="b"))
    idle, beside_busy = (_costs(rig, rig.request(1600)) for rig in rigs)
    names = [field.name for field in fields(Costs) if isinstance(getattr(idle, field.name), np.ndarray)]
    assert {"queue_s", "in_order_s", "shared_s", "hold_up_s", "prefill_s", "ttft_s", "itl_s"} <= set(names)
    for name in names:
        assert getattr(idle, name)[0] == getattr(beside_busy, name)[0], name
    assert beside_busy.queue_s[1] > 0.0


def test_sequences_that_decode_slow_down_prompts_and_tokens() -> None:
    rig = Rig([worker("a"), worker("b")])
    for _ in range(10):
        rig.place(rig.request(1600, pinned_worker="b"))
    for number in range(1, 11):
        rig.selector.first_token(f"r{number}", FirstToken(0, 0.0, 0.1))
    costs = _costs(rig, rig.request())
    assert costs.num_decoding.tolist() == [0, 10]
    assert costs.itl_s[1] > costs.itl_s[0]
    assert costs.prefill_s[1] > costs.prefill_s[0]
    assert costs.compute_s[1] == costs.compute_s[0]


def test_answers_are_expected_to_be_as_long_as_they_were_not_as_long_as_they_may_be() -> None:
    rig = Rig([worker("a")])
    for _ in range(200):
        rig.run(rig.request(max_tokens=4096), num_tokens=40)
    assert _costs(rig, rig.request(max_tokens=4096)).usual_output == pytest.approx(40, rel=0.05)


def test_failed_requests_say_nothing_of_the_length_of_answers() -> None:
    rig = Rig([worker("a")])
    before = _costs(rig, rig.request(max_tokens=4096)).usual_output
    rig.place(rig.request(max_tokens=4096))
    rig.selector.free("r2", Ended(False, 1))
    assert _costs(rig, rig.request(max_tokens=4096)).usual_output == before


def test_a_slow_worker_is_found_out() -> None:
    rig = Rig([worker("a"), worker("b")])
    for _ in range(30):
        for name, seconds in (("a", 0.1), ("b", 0.2)):
            rig.run(rig.request(1600, pinned_worker=name), prefill_s=seconds, num_tokens=2)
    prefill_s = _costs(rig, rig.request(1600)).prefill_s
    assert prefill_s[1] / prefill_s[0] > 1.4


def test_predictions_approach_what_prompts_really_take() -> None:
    rig = Rig([worker("a")])
    for tokens in np.random.default_rng(1).integers(500, 20_000, 100).tolist():
        rig.run(rig.request(tokens), prefill_s=0.02 + tokens * 2e-4)
    costs = _costs(rig, rig.request(10_000))
    assert costs.ttft_s[0] == pytest.approx(2.02, rel=0.15)


def test_prompts_that_end_together_are_learned_as_one() -> None:
    rig = Rig([worker("a")])
    for _ in range(60):
        requests = [rig.request(800), rig.request(800)]
        for request in requests:
            rig.place(request)
        rig.clock.advance(0.2)
        for request in requests:
            rig.selector.first_token(request.request_id, FirstToken(0, 0.0, 0.2))
            rig.selector.free(request.request_id, Ended(True, 1, 0.0))
    assert _costs(rig, rig.request(1600)).ttft_s[0] == pytest.approx(0.2, rel=0.3)


def test_a_decode_worker_pays_for_the_blocks_that_it_lacks() -> None:
    rig = Rig([worker("p", Role.PREFILL), worker("d", Role.DECODE), worker("e", Role.DECODE)])
    names = hashes(*range(10))
    rig.index.blocks[2] = set(names[:6])
    way = rig.selector.select(rig.request(160, block_hashes=names)).way
    assert way is not None
    decode = way.choices[1].costs
    assert decode.transfer_s[1] < decode.transfer_s[0]
    assert not decode.prefill_s.any()
