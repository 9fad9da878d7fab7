"""When a store that fails is left alone, and when it is tried again. Knows time and outcomes, nothing else."""

from __future__ import annotations

from kelp.core.clock import Clock

LONGEST_RETRY_S = 60.0


class CircuitBreaker:
    """Open after failures in a row; one probe at a time then decides. Its owner makes one request at a time.

    Args:
        max_failures: In a row, that open it.
        retry_after_s: Until the first probe; doubles with every probe that fails, up to a minute.
    """

    def __init__(self, max_failures: int, retry_after_s: float, clock: Clock) -> None:
        self._max_failures = max_failures
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._num_failures = 0
        self._wait_s = retry_after_s
        self._retry_at_s = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the store is left alone now; False as soon as a probe is due."""
        return self._is_tripped and self._clock.monotonic_s() < self._retry_at_s

    @property
    def state(self) -> str:
        """`closed`, `open` or `half-open` (a probe is due)."""
        if not self._is_tripped:
            return "closed"
        return "open" if self.is_open else "half-open"

    @property
    def _is_tripped(self) -> bool:
        return self._num_failures >= self._max_failures

    def succeeded(self) -> None:
        """The store answered."""
        self._num_failures = 0
        self._wait_s = self._retry_after_s

    def failed(self) -> None:
        """The store refused, failed or was silent."""
        was_tripped = self._is_tripped
        self._num_failures += 1
        if not self._is_tripped:
            return
        if was_tripped:
            self._wait_s = min(2 * self._wait_s, max(LONGEST_RETRY_S, self._retry_after_s))
        self._retry_at_s = self._clock.monotonic_s() + self._wait_s
