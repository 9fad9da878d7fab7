"""Who goes next when every worker that could take a request is full: order, bound and estimates alone.

No asyncio and no clock of its own: `router.admission` wakes requests by it.
What "full" means, and whether a request fits again, is decided elsewhere.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

from kelp.core.errors import CapacityError
from kelp.router.shares import Shares

RETRY_AFTER = "Retry-After:"
TARGET = "queue.ttft_target_s"
"""What a refusal for want of time to the first token begins with."""
_INTERVAL_WEIGHT = 0.2
_AGED_TURN = 2
_WAIT_SHARE = 0.5
"""Of a request's slack, what it may be expected to wait. Those that start at the last moment are late as soon as they
take longer than predicted, answers above all, and have then cost others their time: under overload, all would."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """One request that waits.

    Attributes:
        priority: Higher goes first.
        latest_start_s: Its deadline less the time it is predicted to need; infinite without a deadline. Within a
            priority and a tenant the earliest goes first, which is shortest slack.
        since_s: When it came; equal requests go in this order.
        tenant: Whose it is; within a priority tenants get equal shares.
        cost: What it takes of its tenant's share.
        longest_wait_s: How long it may wait for its first token to be in time.
    """

    request_id: str
    priority: int
    latest_start_s: float
    since_s: float
    tenant: str = ""
    cost: float = 1.0
    longest_wait_s: float = math.inf


_Key = tuple[int, float, int]
"""Negative priority, latest start, arrival."""

_Lanes = dict[str, list[_Key]]
"""Of one priority: each tenant's requests in their order."""


class WaitingQueue:
    """Waiting requests, at most `max_waiting`; belongs to one thread.

    Strict priorities and slack alone would starve: a request that has waited `ageing_s` is aged, and of two places
    one goes to the aged, in order of arrival.
    """

    def __init__(self, max_waiting: int, ageing_s: float) -> None:
        self._max_waiting = max_waiting
        self._ageing_s = ageing_s
        self._lanes: dict[int, _Lanes] = {}
        self._keys: dict[str, _Key] = {}
        self._by_key: dict[_Key, Waiting] = {}
        self._shares = Shares()
        self._num_pushed = 0
        self._num_taken = 0
        self._interval_s = 0.0
        self._last_taken_s = 0.0

    def __len__(self) -> int:
        return len(self._by_key)

    def push(self, waiting: Waiting) -> Waiting | None:
        """Let a request wait; `since_s` is now.

        Returns:
            The request that must leave for it: a full queue gives up one of its lowest priority for a higher one, or
            for one of a tenant that has fewer there.

        Raises:
            CapacityError: The queue is full, or the request's turn would come too late; says when to try again.
        """
        assert waiting.request_id not in self._keys
        key = (-waiting.priority, waiting.latest_start_s, self._num_pushed)
        expected_s = self._num_before(key, waiting.tenant) * self._interval_s
        if expected_s > _WAIT_SHARE * (waiting.latest_start_s - waiting.since_s):
            raise CapacityError(
                f"deadline_ms: a place is expected in {expected_s:.1f} s, too late for it; {self.retry_after()}"
            )
        if expected_s > waiting.longest_wait_s:
            raise CapacityError(f"{TARGET}: a place is expected in {expected_s:.1f} s; {self.retry_after()}")
        displaced = None
        if len(self) >= self._max_waiting:
            displaced = self._displaceable(waiting)
            if displaced is None:
                raise CapacityError(
                    f"{len(self)} requests wait, the limit is {self._max_waiting}; {self.retry_after()}"
                )
            self.remove(displaced.request_id)
        if not self._by_key:
            self._last_taken_s = waiting.since_s
            self._shares.clear()
        self._num_pushed += 1
        bisect.insort(self._lanes.setdefault(key[0], {}).setdefault(waiting.tenant, []), key)
        self._keys[waiting.request_id] = key
        self._by_key[key] = waiting
        return displaced

    def remove(self, request_id: str) -> Waiting | None:
        """Let go of a request that no longer waits; idempotent."""
        key = self._keys.pop(request_id, None)
        if key is None:
            return None
        waiting = self._by_key.pop(key)
        lanes = self._lanes[key[0]]
        lane = lanes[waiting.tenant]
        del lane[bisect.bisect_left(lane, key)]
        if not lane:
            del lanes[waiting.tenant]
        if not lanes:
            del self._lanes[key[0]]
        return waiting

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
        for rank in sorted(self._lanes):
            for key in self._by_shares(self._lanes[rank]):
                waiting = self._by_key[key]
                if waiting.request_id not in aged:
                    yield waiting

    def take(self, request_id: str, now_s: float) -> Waiting:
        """A request got its place."""
        waiting = self.remove(request_id)
        assert waiting is not None
        self._num_taken += 1
        self._shares.charge(
            waiting.tenant, waiting.cost, {tenant for lanes in self._lanes.values() for tenant in lanes}
        )
        weight = _INTERVAL_WEIGHT if self._interval_s else 1.0
        self._interval_s += weight * (max(0.0, now_s - self._last_taken_s) - self._interval_s)
        self._last_taken_s = now_s
        return waiting

    def hopeless(self, now_s: float) -> list[Waiting]:
        """Requests that can no longer meet their deadline, even if they started now."""
        return [waiting for waiting in self._by_key.values() if waiting.latest_start_s < now_s]

    def too_late(self, now_s: float) -> list[Waiting]:
        """Requests whose first token can no longer come in time."""
        return [item for item in self._by_key.values() if now_s - item.since_s > item.longest_wait_s]

    def retry_after(self) -> str:
        """For error messages: when a client had better try again."""
        return advice(len(self) * self._interval_s)

    def _by_shares(self, lanes: _Lanes) -> Iterator[_Key]:
        """All of one priority, as if each were taken in its turn."""
        if len(lanes) == 1:
            yield from next(iter(lanes.values()))
            return
        heads = [(self._shares.start(tenant), lane[0], 0, tenant) for tenant, lane in lanes.items()]
        heapq.heapify(heads)
        while heads:
            start, key, index, tenant = heads[0]
            yield key
            index += 1
            if index < len(lanes[tenant]):
                heapq.heapreplace(heads, (start + self._by_key[key].cost, lanes[tenant][index], index, tenant))
            else:
                heapq.heappop(heads)

    def _num_before(self, key: _Key, tenant: str) -> int:
        """How many go before this one, if tenants' requests of a priority cost about the same."""
        num_higher = sum([len(lane) for rank, lanes in self._lanes.items() if rank < key[0] for lane in lanes.values()])
        lanes = self._lanes.get(key[0], {})
        num_own = bisect.bisect(lanes.get(tenant, []), key)
        others = [min(num_own + 1, len(lane)) for other, lane in lanes.items() if other != tenant]
        return num_higher + num_own + sum(others)

    def _displaceable(self, newcomer: Waiting) -> Waiting | None:
        """The most patient of the tenant that has most at the lowest priority, if the newcomer goes before it."""
        if not self._lanes:
            return None
        rank = max(self._lanes)
        lanes = self._lanes[rank]
        greediest = max(lanes.values(), key=len)
        has_more = len(greediest) > len(lanes.get(newcomer.tenant, ())) + 1
        if -newcomer.priority < rank or (-newcomer.priority == rank and has_more):
            return self._by_key[greediest[-1]]
        return None


def advice(seconds: float) -> str:
    """`Retry-After` as clients find it in error messages."""
    return f"{RETRY_AFTER} {max(1, math.ceil(seconds))}"
