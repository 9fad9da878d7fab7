"""How long a subscription waits: for news, before it asks again, and before it gives a publisher up for lost."""

from __future__ import annotations

from collections.abc import Callable

from kelp.core.config import EventsConfig

_FIRST_BACKOFF_SHARE = 1 / 40
_SILENT_INTERVALS = 3
_MAX_DOUBLINGS = 16


class Patience:
    """With one publisher; times are of one monotonic clock, in seconds.

    Args:
        config: Limits and waits.
        jitter: Factor on each back-off, so that many subscribers of one worker spread out.
        ttl_s: How long after the publisher last kept us in step its silence means that it is lost.

    Attributes:
        digest_interval_s: How often the publisher promised to speak; None if it did not.
        num_failures: Requests that failed since one succeeded.
        num_mistrusts: Reasons to think that what was applied is not what was meant, since it last proved to be.
    """

    def __init__(self, config: EventsConfig, jitter: Callable[[], float], ttl_s: float) -> None:
        self._config = config
        self._jitter = jitter
        self._ttl_s = ttl_s
        self._heard_s = 0.0
        self._in_step_s = 0.0
        self.digest_interval_s: float | None = None
        self.num_failures = 0
        self.num_mistrusts = 0
        self._num_starts_over = 0
        self._start_over_s = float("-inf")

    def hear(self, now_s: float, *, is_in_step: bool) -> None:
        """The publisher has spoken; `is_in_step`: and nothing is known to be missing."""
        self._heard_s = now_s
        if is_in_step:
            self._in_step_s = now_s

    def settle(self, now_s: float) -> None:
        """Nothing is missing any more."""
        self.hear(now_s, is_in_step=True)
        self.num_failures = 0

    def is_silence(self, now_s: float) -> bool:
        """Whether the publisher had better be asked if it is still there."""
        if self.digest_interval_s is None:
            return now_s >= self._heard_s + self._config.audit_interval_s
        return now_s >= self._heard_s + self.digest_interval_s * _SILENT_INTERVALS

    def may_start_over(self, now_s: float) -> bool:
        """Whether to ask a publisher without snapshots for all that it still has; ever less often, each True counts."""
        if now_s < self._start_over_s:
            return False
        exponent = min(self._num_starts_over, _MAX_DOUBLINGS)
        self._start_over_s = now_s + self._config.audit_interval_s * 2.0**exponent
        self._num_starts_over += 1
        return True

    def is_over(self, now_s: float) -> bool:
        """Whether requests have failed for so long that the publisher counts as lost."""
        return self.num_failures > 0 and now_s >= self._in_step_s + self._ttl_s

    def backoff_s(self) -> float:
        """Until the next request."""
        exponent = min(self.num_failures + self.num_mistrusts - 1, _MAX_DOUBLINGS)
        return self._config.max_backoff_s * min(1.0, _FIRST_BACKOFF_SHARE * 2.0**exponent) * self._jitter()
