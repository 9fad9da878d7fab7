"""Whether workers compute prompts in order of arrival is found out from how long prompts waited."""

from __future__ import annotations

import pytest

from kelp.router.decision.lengths import AnswerLengths
from kelp.router.decision.prompt_order import PromptOrder, Waits
from kelp.router.decision.request import RoutingRequest
from support.selector_rig import Rig, worker


@pytest.mark.parametrize(("waited_s", "in_order"), [(8.0, 1.0), (0.5, 0.0), (4.25, 0.5)])
def test_the_order_is_where_waits_are_between_the_two_predictions(waited_s: float, in_order: float) -> None:
    order = PromptOrder()
    for _ in range(100):
        order.observe(Waits(own_s=1.0, in_order_s=8.0, shared_s=0.5), 1.0 + waited_s)
    assert order.in_order == pytest.approx(in_order, abs=0.01)


def test_a_prompt_that_would_wait_as_long_either_way_tells_nothing() -> None:
    order = PromptOrder()
    before = order.in_order
    order.observe(Waits(own_s=1.0, in_order_s=2.0, shared_s=2.0), 9.0)
    assert order.in_order == before


def test_workers_that_change_their_order_are_noticed() -> None:
    order = PromptOrder()
    for waited_s in (8.0, 0.5):
        for _ in range(3000):
            order.observe(Waits(1.0, 8.0, 0.5), 1.0 + waited_s)
    assert order.in_order < 0.05


def test_a_short_prompt_expects_less_of_a_wait_behind_a_long_one_where_prompts_share_steps() -> None:
    rig = Rig([worker("a")])
    rig.place(rig.request(20_000))
    waits: list[list[float]] = []
    for in_order in (1.0, 0.0):
        rig.selector.order.in_order = in_order
        way = rig.selector.select(_short(rig)).way
        assert way is not None
        costs = way.choices[0].costs
        waits.append([float(costs.queue_s[0]), float(costs.hold_up_s[0])])
    (in_order_s, nobody_s), (shared_s, held_up_s) = waits
    assert (nobody_s, held_up_s) == (0.0, shared_s)
    assert 0 < shared_s < 0.1 * in_order_s


def test_a_usual_answer_is_not_moved_by_one_that_is_a_hundred_times_as_long() -> None:
    lengths = AnswerLengths()
    for _ in range(500):
        lengths.observe(50)
    lengths.observe(5000)
    assert 50 <= lengths.usual < 52


def _short(rig: Rig) -> RoutingRequest:
    return rig.request(160)
