"""Sealed blocks on their way to the manager: taken from the executor's thread, handed to the event loop's."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from kelp.core.clock import Clock
from kelp.executor.base import SealedBlock


class OffloadBuffer:
    """Thread-safe, and bounded by what it has handed out and not yet got back.

    Args:
        limit: Most blocks that are held at any time.
        wake: Called from the executor's thread when the first block has come.
    """

    def __init__(self, limit: int, clock: Clock, wake: Callable[[], None]) -> None:
        self.limit = limit
        self.is_open = False
        self.oldest_s = 0.0
        self.num_postponed = 0
        self._clock = clock
        self._wake = wake
        self._lock = threading.Lock()
        self._waiting: deque[SealedBlock] = deque()
        self._num_held = 0

    @property
    def num_waiting(self) -> int:
        """Blocks that nobody has taken yet."""
        return len(self._waiting)

    @property
    def num_held(self) -> int:
        """Blocks that the executor keeps still."""
        return self._num_held

    def keep(self, blocks: Sequence[SealedBlock]) -> int:
        """`executor.base.SealWatch`."""
        with self._lock:
            if not self.is_open:
                return 0
            num_kept = min(len(blocks), self.limit - self._num_held)
            self.num_postponed += len(blocks) - num_kept
            if not num_kept:
                return 0
            is_first = not self._waiting
            self._waiting.extend(blocks[:num_kept])
            self._num_held += num_kept
            if is_first:
                self.oldest_s = self._clock.monotonic_s()
        if is_first:
            self._wake()
        return num_kept

    def take(self, count: int) -> list[SealedBlock]:
        """The first blocks that wait, up to `count` of one tenant."""
        with self._lock:
            taken: list[SealedBlock] = []
            while self._waiting and len(taken) < count:
                if taken and self._waiting[0].tenant != taken[0].tenant:
                    break
                taken.append(self._waiting.popleft())
            return taken

    def give_back(self, count: int) -> None:
        """The executor has been told to let go of so many."""
        with self._lock:
            self._num_held -= count
            assert self._num_held >= 0
