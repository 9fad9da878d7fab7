"""Where a request runs, from the decision until nothing of it is left there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from kelp.client.base import WorkerOutput
from kelp.core.clock import Clock
from kelp.core.errors import CapacityError
from kelp.core.messages import Finished, Progress, RequestTimings
from kelp.core.types import WorkerKey
from kelp.registry.base import WorkerRecord
from kelp.router.admission import Admission
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.selector import Decision, Ended, FirstToken, Selector
from kelp.router.ledger import Ledger


class WorkersView(Protocol):
    """What the router needs of `registry.view`."""

    def records(self) -> list[WorkerRecord]:
        """All known workers."""

    def is_alive(self, worker_id: str, epoch: str) -> bool:
        """Whether this incarnation still renews its record."""

    async def refresh(self) -> None:
        """Look again, now."""


_RENEWALS = 2


def key_of(record: WorkerRecord) -> WorkerKey:
    """See `WorkerKey`."""
    return record.key


class Placement:
    """A request's reserved place; whoever got one must `end` it, on whatever way.

    Attributes:
        decode: The worker that generates.
        prefill: The worker that computes the prompt; None: the decode worker does everything (aggregated).
    """

    def __init__(self, decision: Decision, ledger: Ledger, clock: Clock) -> None:
        self.decision = decision.settled()
        self.decode = decision.decode
        self.prefill = decision.prefill
        self._ledger = ledger
        self._clock = clock
        self._reserved_s = clock.monotonic_s()
        self._first_s: float | None = None
        self._last_s = self._reserved_s
        self._prefilled_ns = 0
        self._num_tokens = 0
        self._unannounced: Decision | None = decision
        self._is_over = self._is_transfer_told = False

    @property
    def worker_ids(self) -> tuple[str, ...]:
        """All workers involved, prefill first."""
        return self.decision.worker_ids

    def sent(self) -> None:
        """A worker has been told to start."""
        decision, self._unannounced = self._unannounced, None
        if decision is not None and not self._is_over:
            self._ledger.commit(self.decision)
            self._ledger.announce(decision)

    def heard(self, output: WorkerOutput) -> None:
        """A worker of the placement has said something."""
        if self._is_over:
            return
        if output.event is not None and self.prefill is not None:
            self._note_handoff(output.event.timings)
        num_tokens = len(output.token_ids)
        if not num_tokens:
            return
        self._last_s = self._clock.monotonic_s()
        if self._first_s is None:
            self._first_s = self._last_s
            self._ledger.first_token(self.decision, _told(output.event), self._first_s - self._reserved_s)
        self._num_tokens += num_tokens
        self._ledger.progress(self.decision, num_tokens)

    def end(self, is_completed: bool) -> None:
        """Nothing of the request runs there any more; idempotent."""
        if self._is_over:
            return
        self._is_over = True
        decode_s = 0.0 if self._first_s is None else self._last_s - self._first_s
        self._ledger.free(self.decision, Ended(is_completed, self._num_tokens, decode_s))

    def _note_handoff(self, timings: RequestTimings) -> None:
        """What of the transfer prefill did not hide; hosts' clocks may differ, so it is never below zero."""
        self._prefilled_ns = timings.prefill_done_ns or self._prefilled_ns
        if not self._is_transfer_told and timings.transfer_done_ns:
            self._is_transfer_told = True
            since_ns = max(self._prefilled_ns, timings.transfer_start_ns)
            self._ledger.transferred(self.decision, max(0, timings.transfer_done_ns - since_ns) / 1e9)


def _told(event: Progress | Finished | None) -> FirstToken:
    """Times of one worker, by its own clock; without them the selector learns from its own."""
    if event is None:
        return FirstToken(0, 0.0, 0.0)
    timings, usage = event.timings, event.usage
    done_ns = timings.first_token_ns or timings.prefill_done_ns
    queue_ns = prefill_ns = 0
    if timings.first_scheduled_ns and done_ns:
        queue_ns = timings.first_scheduled_ns - (timings.arrival_ns or timings.first_scheduled_ns)
        prefill_ns = done_ns - max(timings.first_scheduled_ns, timings.onboard_done_ns)
    return FirstToken(
        num_cached_tokens=usage.cached_tokens,
        queue_s=max(0, queue_ns) / 1e9,
        prefill_s=max(0, prefill_ns) / 1e9,
        onboarded_blocks=usage.onboarded_tiers,
        onboard_s=max(0, timings.onboard_done_ns - timings.onboard_start_ns) / 1e9,
    )


@dataclass(slots=True)
class _Left:
    """A worker that was left.

    A renewal after that tells the truth: it is not ready, or lives, and only the way to it had broken. The first one
    that is seen may have been written before.
    """

    beat_ns: int
    num_renewals: int = 0

    def still_counts(self, beat_ns: int | None) -> bool:
        """Whether nobody is to be sent there; None: its record has gone."""
        if beat_ns is not None and beat_ns != self.beat_ns:
            self.beat_ns, self.num_renewals = beat_ns, self.num_renewals + 1
        return beat_ns is not None and self.num_renewals < _RENEWALS


class Placer:
    """Finds places; belongs to one event loop."""

    def __init__(
        self, view: WorkersView, selector: Selector, admission: Admission, ledger: Ledger, clock: Clock
    ) -> None:
        self._view = view
        self._selector = selector
        self._admission = admission
        self._ledger = ledger
        self._clock = clock
        self._left: dict[WorkerKey, _Left] = {}
        self.update()

    def update(self) -> None:
        """The view has been refreshed: take it over."""
        records = self._view.records()
        beats_ns = {key_of(record): record.heartbeat_ns for record in records}
        self._left = {key: left for key, left in self._left.items() if left.still_counts(beats_ns.get(key))}
        self._selector.set_workers([record for record in records if key_of(record) not in self._left])
        self._admission.wake()

    def leave(self, record: WorkerRecord) -> None:
        """A worker has ended or gives its requests up: nobody is sent there until its record shows that it lives."""
        latest = next((known for known in self._view.records() if key_of(known) == key_of(record)), record)
        self._left[key_of(record)] = _Left(latest.heartbeat_ns)
        self.update()

    async def place(
        self, request: RoutingRequest, avoid: frozenset[WorkerKey] = frozenset(), allow_prefill: bool = True
    ) -> Placement:
        """Choose workers and reserve there; waits while all that could take the request are full.

        Args:
            request: What to place.
            avoid: Workers that have just failed this request; used again only if nothing else is left.
            allow_prefill: False once remote prefill has failed too often for this request.

        Raises:
            CapacityError: No worker of a needed role is ready, or the queue has no place for the request.
        """
        try:
            expected = self._selector.select(request, avoid, allow_prefill)
        except CapacityError:
            await self._view.refresh()
            self.update()
            expected = self._selector.select(request, avoid, allow_prefill)
        return self._placement(await self._admission.admit(expected, avoid, allow_prefill))

    def beside(self, placement: Placement, request: RoutingRequest) -> Placement:
        """A place for a sequence whose prompt the decode worker of `placement` has; it needs no room in the queue."""
        pinned = replace(request, pinned_worker=placement.decode.worker_id)
        try:
            decision = self._selector.select(pinned, allow_prefill=False)
        except CapacityError:
            decision = Decision(request, placement.decode, None)
        self._ledger.reserve(decision)
        return self._placement(decision)

    def _placement(self, decision: Decision) -> Placement:
        return Placement(decision, self._ledger, self._clock)
