"""Who goes next: order, bound, displacement, hopelessness and the advice to come again."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kelp.core.errors import CapacityError
from kelp.router.queue import Waiting, WaitingQueue

AGEING_S = 5.0
PLAIN: dict[str, Any] = {"priority": 0, "since_s": 0.0}


def waiting(name: str, priority: int = 0, latest_start_s: float = math.inf, since_s: float = 0.0) -> Waiting:
    return Waiting(name, priority, latest_start_s, since_s)


def queue_of(*entries: Waiting, max_waiting: int = 100) -> WaitingQueue:
    queue = WaitingQueue(max_waiting, AGEING_S)
    for entry in entries:
        assert queue.push(entry) is None
    return queue


def drained(queue: WaitingQueue, now_s: float = 0.0) -> list[str]:
    names = []
    while queue:
        name = next(queue.in_turn(now_s)).request_id
        queue.take(name, now_s)
        names.append(name)
    return names


def test_equal_requests_go_in_order_of_arrival() -> None:
    assert drained(queue_of(waiting("a"), waiting("b"), waiting("c"))) == ["a", "b", "c"]


def test_the_shortest_slack_goes_first() -> None:
    queue = queue_of(waiting("calm"), waiting("soon", latest_start_s=9.0), waiting("sooner", latest_start_s=8.0))
    assert drained(queue) == ["sooner", "soon", "calm"]


def test_a_higher_priority_goes_before_a_shorter_slack() -> None:
    queue = queue_of(waiting("soon", latest_start_s=1.0), waiting("important", priority=1))
    assert drained(queue) == ["important", "soon"]


def test_of_two_places_one_goes_to_whoever_has_aged() -> None:
    queue = queue_of(waiting("old"), waiting("older class", priority=-1))
    for number in range(4):
        queue.push(waiting(f"vip {number}", priority=9, since_s=AGEING_S))
    assert drained(queue, now_s=AGEING_S) == ["vip 0", "old", "vip 1", "older class", "vip 2", "vip 3"]


def test_every_waiting_request_is_offered_exactly_once() -> None:
    queue = queue_of(*(waiting(str(number), priority=number % 3) for number in range(9)))
    queue.take("4", 0.0)
    offered = [entry.request_id for entry in queue.in_turn(AGEING_S)]
    assert sorted(offered) == sorted(set(offered)) == ["0", "1", "2", "3", "5", "6", "7", "8"]


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    queue = queue_of(waiting("a"), waiting("b"), max_waiting=2)
    with pytest.raises(CapacityError, match=r"2 requests wait, the limit is 2; Retry-After: 1"):
        queue.push(waiting("c"))
    assert drained(queue) == ["a", "b"]


def test_a_full_queue_gives_up_its_least_urgent_request_for_a_more_important_one() -> None:
    queue = queue_of(waiting("a"), waiting("b"), max_waiting=2)
    displaced = queue.push(waiting("important", priority=1))
    assert displaced is not None and displaced.request_id == "b"
    assert drained(queue) == ["important", "a"]


def test_a_queue_without_room_refuses_everybody() -> None:
    with pytest.raises(CapacityError, match="the limit is 0"):
        WaitingQueue(0, AGEING_S).push(waiting("a", priority=5))


def test_a_request_that_left_is_not_offered() -> None:
    queue = queue_of(waiting("a"), waiting("b"))
    assert queue.remove("a") == waiting("a")
    assert queue.remove("a") is None
    assert drained(queue) == ["b"]


def test_a_request_whose_turn_would_come_too_late_is_refused_at_once() -> None:
    queue = queue_of(waiting("a"), waiting("b"), waiting("c"))
    queue.take("a", 10.0)
    with pytest.raises(CapacityError, match=r"expected in 20.0 s, too late for it; Retry-After: 20"):
        queue.push(waiting("late", latest_start_s=25.0, since_s=10.0, priority=-1))
    assert queue.push(waiting("in time", latest_start_s=50.0, since_s=10.0, priority=-1)) is None


def test_a_deadline_that_cannot_be_met_even_now_is_refused() -> None:
    with pytest.raises(CapacityError, match="too late"):
        queue_of().push(waiting("a", latest_start_s=0.5, since_s=1.0))


def test_waiting_too_long_makes_a_request_hopeless() -> None:
    queue = queue_of(waiting("a", latest_start_s=3.0), waiting("b", latest_start_s=9.0), waiting("c"))
    assert queue.hopeless(3.0) == []
    assert [entry.request_id for entry in queue.hopeless(3.5)] == ["a"]


def test_half_of_the_slack_is_the_most_that_a_request_may_be_expected_to_wait() -> None:
    queue = queue_of(*(waiting(str(number)) for number in range(4)))
    queue.take("0", 2.0)
    with pytest.raises(CapacityError, match=r"in 6\.0 s, too late"):
        queue.push(waiting("hurried", priority=-1, latest_start_s=13.9, since_s=2.0))
    queue.push(waiting("calm", priority=-1, latest_start_s=14.1, since_s=2.0))


def of(tenant: str, number: int, latest_start_s: float = math.inf, **fields: Any) -> Waiting:
    return Waiting(f"{tenant}{number}", latest_start_s=latest_start_s, tenant=tenant, **{**PLAIN, **fields})


def test_tenants_take_turns_whoever_has_more_waiting() -> None:
    queue = queue_of(*(of("a", number) for number in range(5)), of("b", 0), of("c", 0), of("b", 1))
    assert drained(queue) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3", "a4"]


def test_a_tenant_whose_requests_are_large_goes_less_often() -> None:
    queue = queue_of(*(of("a", number, cost=3.0) for number in range(3)), *(of("b", number) for number in range(5)))
    assert drained(queue) == ["a0", "b0", "b1", "b2", "a1", "b3", "b4", "a2"]


def test_within_a_tenant_the_shortest_slack_goes_first_and_between_equal_tenants_as_well() -> None:
    queue = queue_of(of("a", 0, 9.0), of("a", 1, 5.0), of("b", 0, 7.0), of("b", 1, 3.0))
    assert drained(queue) == ["b1", "a1", "b0", "a0"]


def test_shares_do_not_reach_across_priorities() -> None:
    queue = queue_of(of("b", 0), *(of("a", number, priority=1) for number in range(2)))
    assert drained(queue) == ["a0", "a1", "b0"]


def test_a_tenant_that_comes_late_is_not_owed_what_others_had_before() -> None:
    queue = queue_of(*(of("a", number) for number in range(6)), *(of("b", number) for number in range(4)))
    for name in ("a0", "b0", "a1", "b1"):
        queue.take(name, 0.0)
    for number in range(3):
        queue.push(of("late", number))
    assert drained(queue)[:6] == ["a2", "b2", "late0", "a3", "b3", "late1"]


def test_a_full_queue_makes_room_for_a_tenant_that_has_less_of_it() -> None:
    queue = queue_of(of("a", 0, 9.0), of("a", 1, 5.0), of("a", 2, 7.0), max_waiting=3)
    displaced = queue.push(of("b", 0))
    assert displaced is not None and displaced.request_id == "a0", "the one with most time left"
    for newcomer in (of("b", 1), of("a", 3), of("c", 0, priority=-1)):
        with pytest.raises(CapacityError, match="the limit is 3"):
            queue.push(newcomer)
    displaced = queue.push(of("c", 1))
    assert displaced is not None and displaced.request_id == "a2"


def test_advice_follows_how_fast_places_come_free() -> None:
    queue = queue_of(*(waiting(str(number)) for number in range(4)))
    queue.take("0", 2.0)
    assert queue.retry_after() == "Retry-After: 6"
    queue.take("1", 2.0)
    assert queue.retry_after() == "Retry-After: 4"
