"""The course of a run: each fault at its time, and again a little later if nobody was there to be hit.

A kind that nobody has suffered by the end of the schedule is tried on for a while; the load goes on meanwhile. It knows
neither a fleet nor what the faults are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from kelp.chaos.done import Done
from kelp.chaos.faults import Fault, FaultKind
from kelp.core.clock import Clock, SystemClock

_AGAIN_S = 4.0
_MAX_TRIES = 3
_EXTRA_S = 20.0


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
        self._done_kinds: set[FaultKind] = set()
        self._has_ended = False

    @property
    def is_over(self) -> bool:
        """The schedule's time is up, and every fault has ended."""
        return self._has_ended and self._clock.monotonic_s() >= self._end_s

    async def play(self, faults: Sequence[Fault]) -> list[Done]:
        """Each fault at its time, whether or not the one before has ended; what became of them."""
        running = []
        try:
            for fault in faults:
                await self._sleep(max(0.0, self._started_s + fault.at_s - self._clock.monotonic_s()))
                running.append(asyncio.ensure_future(self._settle(fault)))
            return list(await asyncio.gather(*running))
        finally:
            self._has_ended = True

    async def _settle(self, fault: Fault) -> Done:
        num_tries = 1
        while not (done := await self._do(fault)).is_done and self._is_tried_again(fault, num_tries):
            num_tries += 1
            await self._sleep(_AGAIN_S)
        if done.is_done:
            self._done_kinds.add(fault.kind)
        if num_tries > 1:
            done = replace(done, note=f"{done.note} (try {num_tries})")
        self._on_done(done)
        return done

    def _is_tried_again(self, fault: Fault, num_tries: int) -> bool:
        now_s = self._clock.monotonic_s() + _AGAIN_S
        if fault.kind in self._done_kinds:
            return num_tries < _MAX_TRIES and now_s < self._end_s
        return now_s < self._end_s + _EXTRA_S
