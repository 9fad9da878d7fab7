"""When to hand sealed blocks down: late enough to travel together, slowly enough to leave decoding alone.

While the engine runs, the manager's READ and checksum, which take another core and the memory's bandwidth, may take a
tenth of the time; blocks wait for others until half of the buffer is full, or a quarter of a second. When it idles they
go at once.
"""

from __future__ import annotations

from dataclasses import dataclass

DUTY = 0.1
"""Share of time that Stores may take while the engine runs."""
_MAX_DELAY_S = 0.25
_MAX_REST_S = 1.0


@dataclass(slots=True)
class Pace:
    """Times are monotonic seconds.

    Attributes:
        last_start_s: When the last Store was sent.
        last_end_s: When it was answered.
    """

    last_start_s: float = 0.0
    last_end_s: float = 0.0

    def wait_s(self, now_s: float, oldest_s: float, share_full: float) -> float:
        """How long the next Store waits while the engine runs; 0 for not at all.

        Args:
            now_s: The time.
            oldest_s: When the first of the waiting blocks came.
            share_full: Of the buffer.
        """
        rest_s = min((self.last_end_s - self.last_start_s) * (1 / DUTY - 1), _MAX_REST_S)
        begin_s = self.last_end_s + rest_s
        if share_full < 0.5:
            begin_s = max(begin_s, oldest_s + _MAX_DELAY_S)
        return max(0.0, begin_s - now_s)
