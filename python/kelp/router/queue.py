"""Who goes next when every worker that could take a request is full: order, bound and estimates alone.

No asyncio and no clock of its own: `router.admission` wakes requests by it.
What "full" means, and whether a request fits again, is decided elsewhere.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass

from kelp.core.errors import CapacityError

_INTERVAL_WEIGHT = 0.2
_AGED_TURN = 2


@dataclass(frozen=True, slots=True)
class Waiting:
    """One request that waits.

    Attributes:
        priority: Higher goes first.
        latest_start_s: Its deadline less the time it is predicted to need; infinite without a deadline. Within a
            priority the earliest goes first, which is shortest slack.
        since_s: When it came; equal requests go in this order.
    """

    request_id: str
    priority: int
    latest_start_s: float
    since_s: float


_Key = tuple[int, float, int]


class WaitingQueue:
    """Waiting requests, at most `max_waiting`; belongs to one thread.

    Strict priorities and slack alone would starve: a request that has waited `ageing_s` is aged, and of two places
    one goes to the aged, in order of arrival.
    """

    def __init__(self, max_waiting: int, ageing_s: float) -> None:
        self._max_waiting = max_waiting
        self._ageing_s = ageing_s
        self._order: list[_Key] = []
        self._keys: dict[str, _Key] = {}
        self._by_key: dict[_Key, Waiting] = {}
        self._num_pushed = 0
        self._num_taken = 0
        self._interval_s = 0.0
        self._last_taken_s = 0.0

    def __len__(self) -> int:
        return len(self._order)

    def push(self, waiting: Waiting) -> Waiting | None:
        """Let a request wait; `since_s` is now.

        Returns:
            The request that must leave for it: a full queue gives up the last of its lowest priority for a higher one.

        Raises:
            CapacityError: The queue is full, or the request's turn would come too late; says when to try again.
        """
        assert waiting.request_id not in self._keys
        key = (-waiting.priority, waiting.latest_start_s, self._num_pushed)
        expected_s = bisect.bisect(self._order, key) * self._interval_s
        if waiting.since_s + expected_s > waiting.latest_start_s:
            raise CapacityError(
                f"deadline_ms: a place is expected in {expected_s:.1f} s, too late for it; {self.retry_after()}"
            )
        displaced = None
        if len(self._order) >= self._max_waiting:
            last = self._by_key[self._order[-1]] if self._order else None
            if last is None or last.priority >= waiting.priority:
                raise CapacityError(
                    f"{len(self)} requests wait, the limit is {self._max_waiting}; {self.retry_after()}"
                )
            displaced = last
            self.remove(last.request_id)
        if not self._order:
            self._last_taken_s = waiting.since_s
        self._num_pushed += 1
        bisect.insort(self._order, key)
        self._keys[waiting.request_id] = key
        self._by_key[key] = waiting
        return displaced

    def remove(self, request_id: str) -> Waiting | None:
        """Let go of a request that no longer waits; idempotent."""
        key = self._keys.pop(request_id, None)
        if key is None:
            return None
        del self._order[bisect.bisect_left(self._order, key)]
        return self._by_key.pop(key)

    def in_turn(self, now_s: float) -> Iterator[Waiting]:
        """All that wait, each once, whoever is to be tried first in front. Do not push or remove meanwhile."""
        aged: set[str] = set()
        if self._num_taken % _AGED_TURN == 1:
            for request_id, key in self._keys.items():
                waiting = self._by_key[key]
                if now_s - waiting.since_s < self._ageing_s:
                    break
                aged.add(request_id)
                yield waiting
        for key in self._order:
            waiting = self._by_key[key]
            if waiting.request_id not in aged:
                yield waiting

    def take(self, request_id: str, now_s: float) -> Waiting:
        """A request got its place."""
        waiting = self.remove(request_id)
        assert waiting is not None
        self._num_taken += 1
        weight = _INTERVAL_WEIGHT if self._interval_s else 1.0
        self._interval_s += weight * (max(0.0, now_s - self._last_taken_s) - self._interval_s)
        self._last_taken_s = now_s
        return waiting

    def hopeless(self, now_s: float) -> list[Waiting]:
        """Requests that can no longer meet their deadline, even if they started now."""
        return [self._by_key[key] for key in self._order if self._by_key[key].latest_start_s < now_s]

    def next_hopeless_s(self) -> float:
        """When the first of them turns hopeless; infinite if none does."""
        return min((key[1] for key in self._order), default=math.inf)

    def retry_after(self) -> str:
        """For error messages: when a client had better try again."""
        return f"Retry-After: {max(1, math.ceil(len(self) * self._interval_s))}"
