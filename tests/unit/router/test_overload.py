"""More requests than the fleet can serve: what is answered in time, and who goes without."""

from __future__ import annotations

import re

import pytest
from overload_rig import Asked, Told, arrivals, play

CAPACITY_PER_S = 16.0
"""What two workers of eight sequences each complete."""
SECONDS = 12.0


def goodput(told: list[Told]) -> float:
    return sum(each.is_good for each in told) / SECONDS


def share_good(told: list[Told], **asked: object) -> float:
    those = [each for each in told if all(getattr(each.asked, name) == value for name, value in asked.items())]
    return sum(each.is_good for each in those) / len(those)


def merged(*streams: list[Asked]) -> list[Asked]:
    return sorted((asked for stream in streams for asked in stream), key=lambda asked: asked.at_s)


@pytest.fixture(scope="module")
def at_capacity() -> float:
    return goodput(play(arrivals(CAPACITY_PER_S, SECONDS)))


@pytest.mark.parametrize("load", [1.5, 3.0])
def test_goodput_under_overload_is_that_of_a_full_fleet(at_capacity: float, load: float) -> None:
    told = play(arrivals(load * CAPACITY_PER_S, SECONDS))
    assert goodput(told) >= 0.9 * max(at_capacity, CAPACITY_PER_S * 0.95)
    refused = [each for each in told if each.refusal]
    assert all(re.search(r"Retry-After: \d+$", each.refusal) for each in refused)
    served = len(told) - len(refused)
    assert sum(each.is_good for each in told) >= 0.9 * served, "work that is too late is not begun"


def test_without_a_queue_most_work_is_wasted() -> None:
    told = play(arrivals(3 * CAPACITY_PER_S, 20.0), max_waiting=0)
    assert sum(each.is_good for each in told) / 20.0 < 0.6 * CAPACITY_PER_S


def test_a_tenant_that_floods_takes_nothing_from_another_within_its_share() -> None:
    flood = arrivals(3 * CAPACITY_PER_S, SECONDS, tenant="flood")
    modest = arrivals(0.25 * CAPACITY_PER_S, SECONDS, seed=1, tenant="modest")
    told = play(merged(flood, modest))
    assert share_good(told, tenant="modest") >= 0.95
    assert share_good(told, tenant="flood") < 0.4
    assert goodput(told) >= 0.9 * CAPACITY_PER_S


def test_a_brown_out_takes_the_lowest_priority_first() -> None:
    streams = [
        arrivals(CAPACITY_PER_S, SECONDS, seed=10 + priority, deadline_s=4.0, priority=priority)
        for priority in (-1, 0, 1)
    ]
    told = play(merged(*streams), ageing_s=60.0)
    assert share_good(told, priority=1) >= 0.9
    assert share_good(told, priority=1) > share_good(told, priority=0) > share_good(told, priority=-1)


@pytest.mark.parametrize("queue", [{}, {"refuse_late": False}, {"max_waiting": 0}], ids=["on", "off", "no queue"])
def test_an_answer_that_cannot_come_in_time_is_not_begun_while_workers_are_busy(queue: dict[str, object]) -> None:
    busy = arrivals(0.6 * CAPACITY_PER_S, 9.0)
    hopeless = Asked(8.0, 800, 4, deadline_s=0.05)
    told = play(merged(busy, [hopeless]), **queue)
    (refused,) = [each for each in told if each.asked is hopeless]
    if queue:
        assert not refused.refusal
        return
    assert re.fullmatch(r"deadline_ms: missed by \d\.\d s, as workers are busy; Retry-After: \d", refused.refusal)


def test_an_idle_worker_gets_even_what_is_predicted_to_be_late() -> None:
    hurried = Asked(SECONDS + 30.0, 800, 4, deadline_s=0.05)
    told = play([*arrivals(4.0, SECONDS), hurried])
    assert told[-1].asked is hurried and not told[-1].refusal


def test_with_a_target_for_the_first_token_requests_that_would_miss_it_are_refused_and_others_keep_it() -> None:
    asked = arrivals(2 * CAPACITY_PER_S, SECONDS, deadline_s=600.0)
    patient, hurried = play(asked), play(asked, ttft_target_s=1.0)
    assert not any(each.refusal for each in patient)
    assert sum(each.ttft_s > 1.0 for each in patient) > 0.5 * len(patient)
    refusals = [each.refusal for each in hurried if each.refusal]
    assert refusals and all(re.match(r"queue\.ttft_target_s: .*; Retry-After: \d+$", text) for text in refusals)
    served = [each for each in hurried if not each.refusal]
    assert sum(each.ttft_s <= 1.1 for each in served) >= 0.95 * len(served)
    in_time = sum(each.end_s <= SECONDS for each in hurried) / SECONDS
    assert in_time >= 0.85 * CAPACITY_PER_S, "workers are kept busy all the same"
