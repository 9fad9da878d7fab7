"""Faults come at their times, and those that hit nobody come again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kelp.chaos.course import Course
from kelp.chaos.done import Done
from kelp.chaos.faults import Fault, FaultKind
from kelp.core.clock import FakeClock

KILL = Fault(2.0, FaultKind.WORKER_KILLED, "decode")
DURATION_S = 20.0


class Fleet:
    """Can be hit from a moment on."""

    def __init__(self, clock: FakeClock, from_s: float) -> None:
        self._clock = clock
        self._from_s = clock.monotonic_s() + from_s
        self.tried_s: list[float] = []

    async def suffer(self, fault: Fault) -> Done:
        now_s = self._clock.monotonic_s()
        self.tried_s.append(now_s)
        is_done = now_s >= self._from_s
        return Done(fault, now_s, is_done, "hit" if is_done else "nobody there")


def _time(done: Done) -> float:
    return done.at_s


def played(faults: Sequence[Fault], from_s: float, spare: Sequence[Fault] = ()) -> tuple[list[Done], bool, bool]:
    """What became of them, and whether the run was over before and after."""
    clock = FakeClock()
    told: list[Done] = []

    async def sleep(seconds: float) -> None:
        clock.advance(seconds)
        await asyncio.sleep(0)

    async def play() -> tuple[list[Done], bool, bool]:
        course = Course(Fleet(clock, from_s).suffer, DURATION_S, told.append, clock, sleep)
        was_over = course.is_over
        done = await course.play(faults, spare)
        clock.advance(DURATION_S)
        return done, was_over, course.is_over

    result = asyncio.run(play())
    assert sorted(told, key=_time) == sorted(result[0], key=_time)
    return result


def test_a_fault_comes_at_its_time_and_the_run_is_over_after_the_last() -> None:
    (done,), was_over, is_over = played([KILL], from_s=0.0)
    assert (done.at_s, done.note) == (1002.0, "hit")
    assert (was_over, is_over) == (False, True)


def test_a_fault_that_hit_nobody_is_tried_again() -> None:
    (done,), _, _ = played([KILL], from_s=8.0)
    assert done.is_done
    assert done.note == "hit (try 3)"


def test_a_kind_that_hit_nobody_is_tried_for_a_while_after_the_schedule() -> None:
    (done,), _, _ = played([KILL], from_s=DURATION_S + 5.0)
    assert done.is_done
    assert done.at_s > 1000.0 + DURATION_S


def test_in_the_end_it_is_told_as_not_done() -> None:
    (done,), _, is_over = played([KILL], from_s=1000.0)
    assert not done.is_done
    assert done.note.startswith("nobody there (try ")
    assert is_over


def test_a_kind_that_was_done_is_not_tried_for_ever() -> None:
    clock = FakeClock()
    fleet = Fleet(clock, 0.0)

    async def sleep(seconds: float) -> None:
        clock.advance(seconds)

    async def suffer(fault: Fault) -> Done:
        done = await fleet.suffer(fault)
        return done if len(fleet.tried_s) == 1 else Done(fault, done.at_s, False, "nobody there")

    async def play() -> list[Done]:
        course = Course(suffer, 1000.0, lambda _: None, clock, sleep)
        return [*await course.play([KILL]), *await course.play([KILL])]

    first, second = asyncio.run(play())
    assert first.is_done and not second.is_done
    assert second.note == "nobody there (try 3)"


def test_spare_faults_fill_the_time_in_which_nothing_hits() -> None:
    spare = [Fault(0.0, FaultKind.BAD_INPUT)] * 100
    done, _, is_over = played([KILL], from_s=6.0, spare=spare)
    times = [1006.0, *sorted(item.at_s for item in done if item.is_done), 1000.0 + DURATION_S]
    assert max(later - earlier for earlier, later in zip(times, times[1:], strict=False)) <= 3.0
    assert all(item.is_done for item in done)
    assert sum("in a lull" in item.note for item in done) < len(spare)
    assert is_over


def test_spare_faults_that_hit_nobody_are_not_told() -> None:
    (done,), _, _ = played([KILL], from_s=1000.0, spare=[Fault(0.0, FaultKind.BAD_INPUT)] * 100)
    assert done.fault.kind is FaultKind.WORKER_KILLED
