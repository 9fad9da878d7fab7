"""The course of a run: each fault at its time, and again a little later if nobody was there to be hit.

A kind that nobody has suffered by the end of the schedule is tried on for a while; the load goes on meanwhile. While
nothing hits, spare faults fill the time. It knows neither a fleet nor what the faults are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace

from kelp.chaos.done import Done
from kelp.chaos.faults import Fault, FaultKind
from kelp.core.clock import Clock, SystemClock

_AGAIN_S = 4.0
_MAX_TRIES = 3
_EXTRA_S = 60.0
_LULL_S = 2.5
"""Without a fault that has hit, until a spare one comes."""
_LOOK_S = 0.3


class Course:
    """Plays one schedule; belongs to one event loop.

    Args:
        do: Does one fault.
        duration_s: Of the schedule.
        on_done: Told of every fault once it is settled.
        sleep: Of that clock.
    """

    def __init__(
        self,
        do: Callable[[Fault], Awaitable[Done]],
        duration_s: float,
        on_done: Callable[[Done], None],
        clock: Clock | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._do = do
        self._clock = clock or SystemClock()
        self._sleep = sleep
        self._on_done = on_done
        self._started_s = self._clock.monotonic_s()
        self._end_s = self._started_s + duration_s
        self._last_hit_s = self._started_s
        self._begun_s = [self._started_s]
        self._done_kinds: set[FaultKind] = set()
        self._has_ended = False

    @property
    def is_over(self) -> bool:
        """The schedule's time is up, and every fault has ended."""
        return self._has_ended and self._clock.monotonic_s() >= self._end_s

    async def play(self, faults: Sequence[Fault], spare: Iterable[Fault] = ()) -> list[Done]:
        """Each fault at its time, whether or not the one before has ended; what became of them.

        Args:
            faults: In the order of their times.
            spare: Done one by one whenever no other has hit for a while, until the schedule's time is up.
        """
        filling = asyncio.ensure_future(self._fill_lulls(spare))
        running = []
        try:
            for fault in faults:
                await self._sleep(max(0.0, self._started_s + fault.at_s - self._clock.monotonic_s()))
                running.append(asyncio.ensure_future(self._settle(fault)))
            done = list(await asyncio.gather(*running))
            return done + await filling
        finally:
            filling.cancel()
            self._has_ended = True

    async def _fill_lulls(self, spare: Iterable[Fault]) -> list[Done]:
        filling = []
        try:
            for fault in spare:
                while (lull_s := self._clock.monotonic_s() - max(self._last_hit_s, *self._begun_s)) < _LULL_S:
                    await self._sleep(min(_LULL_S - lull_s, _LOOK_S))
                if self._clock.monotonic_s() >= self._end_s:
                    break
                filling.append(asyncio.ensure_future(self._fill(fault)))
                await self._sleep(_LOOK_S)
            return [done for done in await asyncio.gather(*filling) if done.is_done]
        finally:
            for one in filling:
                one.cancel()

    async def _fill(self, fault: Fault) -> Done:
        """As long as it is under way it counts as one that hits: where no server is up that takes a while to show."""
        at_s = self._clock.monotonic_s()
        self._begun_s.append(at_s)
        done = await self._do(replace(fault, at_s=round(at_s - self._started_s, 3)))
        self._begun_s.remove(at_s)
        if done.is_done:
            done = replace(done, note=f"{done.note} (in a lull)")
            self._note(done)
        return done

    async def _settle(self, fault: Fault) -> Done:
        num_tries = 1
        while self._is_tried_again(done := await self._do(fault), num_tries):
            num_tries += 1
            await self._sleep(_AGAIN_S)
        if num_tries > 1:
            done = replace(done, note=f"{done.note} (try {num_tries})")
        self._note(done)
        return done

    def _note(self, done: Done) -> None:
        if done.is_done:
            self._done_kinds.add(done.fault.kind)
            self._last_hit_s = max(self._last_hit_s, done.at_s)
        self._on_done(done)

    def _is_tried_again(self, done: Done, num_tries: int) -> bool:
        if done.is_done or not done.is_possible:
            return False
        now_s = self._clock.monotonic_s() + _AGAIN_S
        if done.fault.kind in self._done_kinds:
            return num_tries < _MAX_TRIES and now_s < self._end_s
        return now_s < self._end_s + _EXTRA_S
