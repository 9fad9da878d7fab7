"""Time as a dependency, so that leases, heartbeats and deadlines are tested without sleeping."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Source of time."""

    def monotonic_s(self) -> float:
        """Seconds that never go backwards; comparable within one process only."""

    def wall_ns(self) -> int:
        """Nanoseconds since the epoch; comparable between processes of one host."""


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        """See `Clock`."""
        return time.monotonic()

    def wall_ns(self) -> int:
        """See `Clock`."""
        return time.time_ns()


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self, start_s: float = 1000.0) -> None:
        self._now_s = start_s

    def monotonic_s(self) -> float:
        """See `Clock`."""
        return self._now_s

    def wall_ns(self) -> int:
        """See `Clock`."""
        return int(self._now_s * 1e9)

    def advance(self, seconds: float) -> None:
        """Move forward."""
        self._now_s += seconds
