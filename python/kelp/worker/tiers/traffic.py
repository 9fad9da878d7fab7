"""What was READ under one lease and how long that took, for the manager, which cannot see it."""

from __future__ import annotations


class ReadTraffic:
    """Adds up parts that may overlap; belongs to one event loop.

    Attributes:
        num_blocks: Those that came and were right.
        busy_s: In which at least one part was under way; waiting for lower tiers does not count.
    """

    def __init__(self) -> None:
        self.num_blocks = 0
        self.busy_s = 0.0
        self._num_open = 0
        self._begin_s = 0.0

    def begin(self, now_s: float) -> None:
        """A part's READ is posted."""
        if not self._num_open:
            self._begin_s = now_s
        self._num_open += 1

    def end(self, now_s: float, num_blocks: int) -> None:
        """It has been read and checked, or is given up."""
        self._num_open -= 1
        self.num_blocks += num_blocks
        if not self._num_open:
            self.busy_s += now_s - self._begin_s
