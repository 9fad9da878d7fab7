"""How the time passes that a timing model says: really, or on a clock that is moved."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from kelp.core.clock import Clock

_LONGEST_DEBT_S = 1e-3


class Pace(Protocol):
    """The device's time. Called from the engine's thread only."""

    def begin(self, seconds: float) -> float:
        """Something that takes `seconds` begins now; returns when it ends."""

    def wait(self, end_s: float) -> None:
        """Return when that time has come."""


class RealPace:
    """Sleeps. A sleep that lasts too long shortens the next one, so that many short steps take what they should."""

    def __init__(
        self, now_s: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._now_s = now_s
        self._sleep = sleep
        self._debt_s = 0.0

    def begin(self, seconds: float) -> float:
        """See `Pace`."""
        return self._now_s() + seconds - self._debt_s

    def wait(self, end_s: float) -> None:
        """See `Pace`."""
        left_s = end_s - self._now_s()
        if left_s > 0:
            self._sleep(left_s)
        self._debt_s = min(max(0.0, self._now_s() - end_s), _LONGEST_DEBT_S)


class MovableClock(Clock, Protocol):
    """Such as `core.clock.FakeClock`."""

    def advance(self, seconds: float) -> None:
        """Move forward."""


class VirtualPace:
    """Moves a clock forward and never waits."""

    def __init__(self, clock: MovableClock) -> None:
        self._clock = clock

    def begin(self, seconds: float) -> float:
        """See `Pace`."""
        return self._clock.monotonic_s() + seconds

    def wait(self, end_s: float) -> None:
        """See `Pace`."""
        self._clock.advance(max(0.0, end_s - self._clock.monotonic_s()))
