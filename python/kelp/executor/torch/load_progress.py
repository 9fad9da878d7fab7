"""Says in the log how far the loading of a large model has come."""

from __future__ import annotations

import logging

from kelp.core.clock import Clock

_log = logging.getLogger(__name__)

_PERIOD_S = 2.0
_GIB = 1 << 30


class LoadProgress:
    """An `OnProgress` that logs every two seconds; a load that takes less says nothing."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started_s = self._said_s = clock.monotonic_s()

    def __call__(self, bytes_done: int, bytes_total: int) -> None:
        """Args: bytes of weights that are in place, and of all."""
        now_s = self._clock.monotonic_s()
        is_end = bytes_done == bytes_total
        has_spoken = self._said_s > self._started_s
        if now_s - self._said_s < _PERIOD_S and not (is_end and has_spoken):
            return
        self._said_s = now_s
        _log.info(
            "weights: %d %% (%.1f of %.1f GiB) after %.0f s",
            100 * bytes_done // max(1, bytes_total),
            bytes_done / _GIB,
            bytes_total / _GIB,
            now_s - self._started_s,
        )
