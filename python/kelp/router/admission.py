"""Lets requests through to workers, or lets them wait: `queue` in asyncio, woken by whatever may have made room.

Whoever waits holds no worker and has cost none anything. A request that leaves (cancelled, displaced, hopeless) is
gone at once; one that is let through has been reserved in the same moment, so that no two get the same place.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import dataclass

from kelp.core.clock import Clock
from kelp.core.config_replicas import QueueConfig
from kelp.core.errors import CapacityError
from kelp.core.metrics import QUEUE_WAIT, Metrics
from kelp.core.types import WorkerKey
from kelp.router.capacity import Capacity, Fullness
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.selector import Decision, Ended, Selector
from kelp.router.ledger import Ledger
from kelp.router.queue import TARGET, Waiting, WaitingQueue, advice

_MAX_TRIES = 8
_POLL_S = 0.25
"""Predicted prefill windows also pass with time alone, and deadlines do."""


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    """What a waiting request asks for, and where it hears of it."""

    request: RoutingRequest
    avoid: frozenset[WorkerKey]
    allow_prefill: bool
    since_s: float
    answer: asyncio.Future[Decision]


class Admission:
    """Belongs to one event loop."""

    def __init__(
        self,
        selector: Selector,
        ledger: Ledger,
        capacity: Capacity,
        config: QueueConfig,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._selector = selector
        self._ledger = ledger
        self._capacity = capacity
        self._refuses_late = config.refuse_late and config.max_waiting > 0
        self._ttft_target_s = config.ttft_target_s or math.inf
        self._clock = clock
        self._metrics = metrics
        self._queue = WaitingQueue(config.max_waiting, config.ageing_s)
        self._wanted: dict[str, _Wanted] = {}
        self._timer: asyncio.TimerHandle | None = None
        ledger.on_room = self.wake

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    async def admit(self, expected: Decision, avoid: frozenset[WorkerKey], allow_prefill: bool) -> Decision:
        """A decision that has been reserved, as soon as there is room for one.

        Args:
            expected: What the selector said just now; holds if its workers have room.
            avoid: See `Selector.select`.
            allow_prefill: See there.

        Raises:
            CapacityError: The queue is full, the deadline cannot be met, or the last worker that could take it left.
        """
        self.wake()
        decision, since_s = expected, self._clock.monotonic_s()
        if not expected.request.is_resumed:
            if self._has_full_worker(expected):
                answer = asyncio.get_running_loop().create_future()
                wanted = _Wanted(expected.request, avoid, allow_prefill, since_s, answer)
                elsewhere = self._elsewhere(wanted, self._capacity.full())
                if elsewhere is None:
                    return await self._wait(wanted, expected)
                decision = elsewhere
            self._check_in_time(decision, since_s)
        self._ledger.reserve(decision)
        return decision

    def wake(self) -> None:
        """Offer what room there is to those who wait."""
        while len(self._queue) and self._let_one_through():
            pass

    async def _wait(self, wanted: _Wanted, expected: Decision) -> Decision:
        request, since_s = wanted.request, wanted.since_s
        name, cost = request.request_id, request.num_prompt_tokens + self._num_expected_tokens(request)
        latest_start_s = self._latest_start_s(expected)
        longest_wait_s = self._ttft_target_s - self._ttft_s(expected)
        displaced = self._queue.push(
            Waiting(name, request.priority, latest_start_s, since_s, request.tenant, max(1.0, cost), longest_wait_s)
        )
        if displaced is not None:
            whose = "of higher priority" if displaced.priority < request.priority else "of a tenant with fewer waiting"
            self._refuse(displaced, f"a request {whose} took its place in the queue")
        self._wanted[name] = wanted
        self._watch()
        try:
            return await wanted.answer
        except asyncio.CancelledError:
            if not wanted.answer.cancelled() and wanted.answer.exception() is None:
                self._ledger.free(wanted.answer.result(), Ended(False))
            raise
        finally:
            self._queue.remove(name)
            del self._wanted[name]
            self._metrics.observe(QUEUE_WAIT, self._clock.monotonic_s() - since_s)

    def _num_expected_tokens(self, request: RoutingRequest) -> float:
        return min(float(request.max_tokens), self._selector.lengths.usual)

    def _latest_start_s(self, expected: Decision) -> float:
        """When it is too late to answer in time; before anything was measured, predictions are no reason to give up."""
        deadline_s = math.inf if expected.request.deadline_s is None else expected.request.deadline_s
        if expected.way is None or not self._selector.rates.is_measured:
            return deadline_s
        num_intervals = max(0.0, self._num_expected_tokens(expected.request) - 1.0)
        return deadline_s - expected.way.ttft_s - num_intervals * expected.way.itl_s

    def _ttft_s(self, decision: Decision) -> float:
        """Predicted; 0 before anything was measured."""
        return 0.0 if decision.way is None or not self._selector.rates.is_measured else decision.way.ttft_s

    def _check_in_time(self, decision: Decision, since_s: float) -> None:
        """An idle worker gets its request in any case: else nothing would ever show that a prediction is wrong.

        Raises:
            CapacityError: The answer, or its first token, is predicted to come too late.
        """
        now_s = self._clock.monotonic_s()
        late_s = now_s - self._latest_start_s(decision) if self._refuses_late else 0.0
        over_s = now_s - since_s + self._ttft_s(decision) - self._ttft_target_s
        if max(late_s, over_s) > 0 and not self._capacity.is_idle(decision.decode.key):
            field, missed_s = ("deadline_ms", late_s) if late_s > 0 else (TARGET, over_s)
            raise CapacityError(f"{field}: missed by {missed_s:.1f} s, as workers are busy; {advice(missed_s)}")

    def _let_one_through(self) -> bool:
        now_s, full = self._clock.monotonic_s(), self._capacity.full()
        if full.is_everywhere:
            return False
        tried: Counter[tuple[frozenset[WorkerKey], bool, str]] = Counter()
        for waiting in self._queue.in_turn(now_s):
            wanted = self._wanted[waiting.request_id]
            if wanted.answer.done():
                continue
            # Where some requests without wishes of their own found no room, others hardly find any: a thousand that
            # wait must not cost a thousand decisions each time that a place falls free elsewhere.
            alike = wanted.avoid, wanted.allow_prefill, wanted.request.model_id
            if _has_no_wishes(wanted.request) and tried[alike] >= _MAX_TRIES:
                continue
            decision = self._try(wanted, full)
            if decision is None and not wanted.answer.done():
                tried[alike] += 1
            if decision is not None:
                self._queue.take(waiting.request_id, now_s)
                self._ledger.reserve(decision)
                wanted.answer.set_result(decision)
                return True
        return False

    def _try(self, wanted: _Wanted, full: Fullness) -> Decision | None:
        try:
            decision = self._elsewhere(wanted, full)
            if decision is not None:
                self._check_in_time(decision, wanted.since_s)
            return decision
        except CapacityError as error:
            wanted.answer.set_exception(error)
            return None

    def _elsewhere(self, wanted: _Wanted, full: Fullness) -> Decision | None:
        """The best decision without a full worker; None if there is none."""
        if not self._capacity.has_room(wanted.request, full):
            return None
        decision = self._selector.select(wanted.request, wanted.avoid | full.workers, wanted.allow_prefill)
        return None if _touches(decision, full) else decision

    def _has_full_worker(self, decision: Decision) -> bool:
        prefill = decision.prefill
        return self._capacity.is_full(decision.decode.key) or (
            prefill is not None and self._capacity.is_full(prefill.key)
        )

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_POLL_S, self._look)

    def _look(self) -> None:
        self._timer, now_s = None, self._clock.monotonic_s()
        for field, late in (("deadline_ms", self._queue.hopeless), (TARGET, self._queue.too_late)):
            for waiting in late(now_s):
                self._queue.remove(waiting.request_id)
                self._refuse(waiting, f"{field}: it can no longer be met, every worker is still full")
        self.wake()
        if len(self._queue):
            self._watch()

    def _refuse(self, waiting: Waiting, why: str) -> None:
        answer = self._wanted[waiting.request_id].answer
        if not answer.done():
            answer.set_exception(CapacityError(f"{why}; {self._queue.retry_after()}"))


def _has_no_wishes(request: RoutingRequest) -> bool:
    return not (request.pinned_worker or request.required_tags)


def _touches(decision: Decision, full: Fullness) -> bool:
    return decision.decode.key in full.workers or (
        decision.prefill is not None and decision.prefill.key in full.workers
    )
