"""Sealed blocks on their way to the manager: taken from the executor's thread, handed to the event loop's.

The executor may evict them on the way. One that waits is forgotten then. One that is being READ is remembered as lost:
the executor says so before it writes over the block, so whoever asks after the READ gets to know of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kelp.core.clock import Clock
from kelp.core.types import SequenceHash
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
        self.num_evicted = 0
        self._clock = clock
        self._wake = wake
        self._lock = threading.Lock()
        self._waiting: dict[SequenceHash, SealedBlock] = {}
        self._taken: set[SequenceHash] = set()
        self._lost: set[SequenceHash] = set()
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
            self._waiting.update((block.sequence_hash, block) for block in blocks[:num_kept])
            self._num_held += num_kept
            if is_first:
                self.oldest_s = self._clock.monotonic_s()
        if is_first:
            self._wake()
        return num_kept

    def note_evicted(self, names: Sequence[SequenceHash]) -> None:
        """`executor.base.EvictionWatch`."""
        with self._lock:
            if not self._num_held:
                return
            num_waiting = len(self._waiting)
            for name in names:
                self._waiting.pop(name, None)
            self._num_held -= num_waiting - len(self._waiting)
            lost = self._taken.intersection(names)
            self.num_evicted += num_waiting - len(self._waiting) + len(lost - self._lost)
            self._lost |= lost

    def take(self, count: int) -> list[SealedBlock]:
        """The first blocks that wait, up to `count` of one tenant; those taken before are of no interest any more."""
        with self._lock:
            taken: list[SealedBlock] = []
            for block in self._waiting.values():
                if len(taken) == count or block.tenant != (taken or [block])[0].tenant:
                    break
                taken.append(block)
            self._taken = {block.sequence_hash for block in taken}
            self._lost = set()
            for name in self._taken:
                del self._waiting[name]
            return taken

    def lost(self) -> frozenset[SequenceHash]:
        """Those of the blocks taken last that have been evicted since."""
        with self._lock:
            return frozenset(self._lost)

    def give_back(self, count: int) -> None:
        """The executor has been told to let go of so many."""
        with self._lock:
            self._num_held -= count
            assert self._num_held >= 0
