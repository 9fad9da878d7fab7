"""The router's queue under arbitrary arrivals and places: nobody is lost, doubled or starved."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kelp.core.errors import CapacityError
from kelp.router.queue import Waiting, WaitingQueue

AGEING_S = 3.0
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(-2, 2), st.floats(0, 40)),
        st.tuples(st.just("take"), st.integers(0, 5), st.just(0.0)),
        st.tuples(st.just("leave"), st.integers(0, 20), st.just(0.0)),
        st.tuples(st.just("pass"), st.integers(1, 4), st.just(0.0)),
    ),
    max_size=80,
)


@given(STEPS, st.integers(0, 6))
def test_what_waits_is_what_came_and_has_not_gone(steps: list[tuple[str, int, float]], max_waiting: int) -> None:
    queue, inside, now_s = WaitingQueue(max_waiting, AGEING_S), {}, 0.0
    for number, (what, value, slack_s) in enumerate(steps):
        if what == "pass":
            now_s += value
        elif what == "push":
            entry = Waiting(str(number), value, now_s + slack_s, now_s)
            try:
                displaced = queue.push(entry)
            except CapacityError:
                continue
            inside[entry.request_id] = entry
            if displaced is not None:
                assert displaced.priority < value
                del inside[displaced.request_id]
        elif what == "leave":
            assert queue.remove(str(value)) == inside.pop(str(value), None)
        elif inside:
            offered = list(queue.in_turn(now_s))
            chosen = offered[value % len(offered)]
            assert queue.take(chosen.request_id, now_s) == inside.pop(chosen.request_id)
        assert len(queue) == len(inside) <= max_waiting
        assert {entry.request_id: entry for entry in queue.in_turn(now_s)} == inside


@given(st.integers(1, 10), st.lists(st.integers(0, 3), max_size=60))
def test_however_important_the_others_an_aged_request_goes_within_twice_the_places_before_it(
    num_before: int, arrivals: list[int]
) -> None:
    queue = WaitingQueue(10_000, AGEING_S)
    for number in range(num_before):
        queue.push(Waiting(f"before {number}", 0, float("inf"), 0.0))
    queue.push(Waiting("patient", -5, float("inf"), 0.0))
    num_places = 0
    for number, num_new in enumerate([*arrivals, *[1] * 2 * (num_before + 1)]):
        for new in range(num_new):
            queue.push(Waiting(f"vip {number} {new}", 9, float("inf"), AGEING_S))
        name = next(queue.in_turn(AGEING_S)).request_id
        queue.take(name, AGEING_S)
        num_places += 1
        if name == "patient":
            break
    assert num_places <= 2 * (num_before + 1)


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 100)), max_size=30))
def test_without_ageing_the_order_is_priority_then_slack_then_arrival(entries: list[tuple[int, float]]) -> None:
    queue = WaitingQueue(100, AGEING_S)
    for number, (priority, slack_s) in enumerate(entries):
        queue.push(Waiting(str(number), priority, slack_s, 0.0))
    order = [int(entry.request_id) for entry in queue.in_turn(0.0)]
    assert order == sorted(range(len(entries)), key=lambda n: (-entries[n][0], entries[n][1], n))
