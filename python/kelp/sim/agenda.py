"""Virtual time: what is going to happen, in order.

Things due at the same moment happen in the order in which they were put down, so that equal runs are equal.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Agenda:
    """The virtual clock (`core.clock.Clock`) and what waits for it; starts at 0."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._num_planned = 0
        self.now_s = 0.0

    def monotonic_s(self) -> float:
        """See `Clock`."""
        return self.now_s

    def wall_ns(self) -> int:
        """See `Clock`."""
        return int(self.now_s * 1e9)

    def at(self, due_s: float, action: Callable[[Any], None], subject: Any) -> None:
        """Do `action(subject)` at a time that has not passed."""
        heapq.heappush(self._heap, (due_s, self._num_planned, action, subject))
        self._num_planned += 1

    def run(self) -> None:
        """Let time pass until nothing is left to do."""
        heap = self._heap
        while heap:
            self.now_s, _, action, subject = heapq.heappop(heap)
            action(subject)
