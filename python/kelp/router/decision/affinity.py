"""Which worker served a session last."""

from __future__ import annotations

from collections import OrderedDict

from kelp.core.types import WorkerKey


class Sessions:
    """Bounded, least recently used first to go; belongs to one event loop."""

    def __init__(self, max_sessions: int, ttl_s: float) -> None:
        self._max_sessions = max_sessions
        self._ttl_s = ttl_s
        self._last: OrderedDict[str, tuple[WorkerKey, float]] = OrderedDict()

    def note(self, session_id: str, worker: WorkerKey, now_s: float) -> None:
        """A request of the session goes there."""
        self._last[session_id] = (worker, now_s)
        self._last.move_to_end(session_id)
        if len(self._last) > self._max_sessions:
            self._last.popitem(last=False)

    def worker_of(self, session_id: str, now_s: float) -> WorkerKey | None:
        """Where it was served last; None if unknown or too long ago."""
        found = self._last.get(session_id)
        if found is None or now_s - found[1] > self._ttl_s:
            return None
        return found[0]
