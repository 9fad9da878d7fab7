"""The engine's steps: plan, launch, land, and tell every request what came of it.

Up to `max_in_flight` steps are launched before the first must land, so that the host plans while the device computes.
Knows what a step does to a sequence; how requests come and go is the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from kelp.core.clock import Clock
from kelp.core.types import FinishReason
from kelp.executor.base import Admitted, ExecutorEvent, Prefilled, Reserved
from kelp.executor.batching.batch import Sampled
from kelp.executor.batching.flights import Flights, Part
from kelp.executor.batching.schedulable import Stage
from kelp.executor.batching.scheduler import Plan, Scheduler
from kelp.executor.batching.sequence import Sequence
from kelp.executor.batching.speculation import Speculation


@dataclass(slots=True)
class Outcome:
    """What a call of `Steps` did.

    Attributes:
        is_idle: Nothing was done, and nothing can be before a command comes.
        ended: Sequences that have said their last token, and why; None for a prefill that shall go on elsewhere.
    """

    is_idle: bool = True
    ended: list[tuple[Sequence, FinishReason | None]] = field(default_factory=list)


class Steps:
    """Steps of one engine; synchronous, single-threaded."""

    def __init__(
        self, flights: Flights, scheduler: Scheduler[Sequence], speculation: Speculation, clock: Clock
    ) -> None:
        self._flights = flights
        self._scheduler = scheduler
        self._speculation = speculation
        self._clock = clock
        self._is_draining = False

    def advance(self) -> Outcome:
        """Launch the next step if there is one, and land the oldest if it is time."""
        num_preemptions = self._scheduler.num_preemptions
        plan = Plan() if self._is_draining else self._scheduler.plan(self._clock.monotonic_s())
        self._is_draining = self._is_draining or plan.is_short
        for sequence in plan.admitted:
            self._report_admission(sequence)
        if plan.work:
            self._flights.launch(plan.work)
        did_preempt = self._scheduler.num_preemptions != num_preemptions
        outcome = Outcome(is_idle=not (plan.admitted or did_preempt or self._flights))
        if self._flights and (self._flights.is_full or self._is_draining or not plan.work):
            self._land(outcome)
        return outcome

    def land_all(self) -> Outcome:
        """Wait until nothing is in flight."""
        outcome = Outcome()
        while self._flights:
            self._land(outcome)
        return outcome

    def _land(self, outcome: Outcome) -> None:
        outcome.is_idle = False
        try:
            flight, sampled = self._flights.land()
        finally:
            self._is_draining = self._is_draining and bool(self._flights)
        first = 0
        for part in flight.parts:
            end = first + len(part.chunk.samples)
            if part.sequence.stage is Stage.RUNNING:
                self._deliver(part, sampled[first:end], outcome)
            first = end

    def _deliver(self, part: Part, sampled: Many[Sampled], outcome: Outcome) -> None:
        sequence, chunk, progress = part.sequence, part.chunk, part.sequence.progress
        if len(sampled) == 1:
            self._speculation.watch(sequence, sampled[0].token_id)
        was_prompt_computed = sequence.is_prompt_computed
        accepted, reason = sequence.land(chunk, sampled)
        num_accepted = len(accepted.token_ids)
        if chunk.num_drafts:
            self._speculation.verified(sequence, chunk.num_drafts, num_accepted - 1)
        now_ns = self._clock.wall_ns()
        if sequence.is_prompt_computed and not was_prompt_computed:
            progress.prefill_done_ns = now_ns
        if num_accepted:
            progress.last_token_ns = now_ns
            progress.first_token_ns = progress.first_token_ns or now_ns
            if not sequence.is_prefill_only:
                # Before the books are kept: a client waits for tokens, and nobody for those.
                _emit(sequence, accepted)
        self._scheduler.seal(sequence)
        self.announce(sequence)
        if num_accepted and sequence.is_prefill_only:
            _emit(sequence, accepted)
        if num_accepted and (reason is not None or sequence.is_prefill_only):
            outcome.ended.append((sequence, reason))

    def _report_admission(self, sequence: Sequence) -> None:
        progress = sequence.progress
        num_cached_blocks = sequence.num_computed // sequence.rules.block_size
        if not progress.first_scheduled_ns:
            progress.first_scheduled_ns = self._clock.wall_ns()
            progress.cached_tokens = sequence.num_computed
            progress.reused_blocks = num_cached_blocks
            _emit(sequence, Admitted(progress.usage, progress.first_scheduled_ns))
        if sequence.is_import:
            progress.transfer_start_ns = self._clock.wall_ns()
            _emit(sequence, Reserved(tuple(sequence.block_ids), num_cached_blocks))
        elif sequence.stage is Stage.IMPORTING:
            _emit(sequence, Reserved(tuple(sequence.block_ids[: sequence.num_onboardable]), num_cached_blocks))
        else:
            sequence.num_onboardable = 0
        self.announce(sequence)

    def announce(self, sequence: Sequence) -> None:
        """Report prompt blocks that a peer may read from now on."""
        if not sequence.is_prefill_only:
            return
        block_ids = sequence.take_announceable()
        if block_ids:
            num_covered = sequence.num_announced * sequence.rules.block_size
            _emit(sequence, Prefilled(min(num_covered, sequence.num_prompt_tokens), tuple(block_ids)))


def _emit(sequence: Sequence, event: ExecutorEvent) -> None:
    sequence.request.sink(event)
