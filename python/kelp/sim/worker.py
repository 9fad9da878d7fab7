"""A simulated worker: the real scheduler and block pool, and steps that take what `truth` says.

While a step is all decodes, the next ones are alike until a sequence ends, needs a block or is due to report, or
somebody from outside comes: so those steps are taken at once (a span), and a span is cut short when somebody comes.
Decisions and times are those of single steps (`may_skip` False), as tests prove.

Knows the steps of one worker; what becomes of requests is told to a `worker_parts.RequestSink`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kelp.core.kv_events import KVEvent
from kelp.executor.batching.scheduler import Scheduler, Work
from kelp.kv.pool import BlockPool
from kelp.sim.network import merged
from kelp.sim.sequence import SimSequence, Task
from kelp.sim.truth import MAX_SPAN_STEPS
from kelp.sim.worker_parts import NoDrafts, RequestSink, Totals, WorkerParts

REPORT_TOKENS = 128
"""A sequence's output is told to the router in portions of this size, and the rest with its end."""


@dataclass(slots=True)
class _Span:
    start_s: float
    num_steps: int
    first_s: float
    growth_s: float
    work: list[Work[SimSequence]]
    is_repeatable: bool


class SimWorker:
    """One incarnation of a worker."""

    def __init__(
        self, parts: WorkerParts, sink: RequestSink, on_events: Callable[[list[KVEvent]], None] = lambda _: None
    ) -> None:
        """Args: `on_events` hears of changes of the prefix cache."""
        self._parts = parts
        self._agenda = parts.agenda
        self._sink = sink
        self._on_events = on_events
        self._pool = BlockPool(parts.num_blocks)
        self._events: list[KVEvent] = []
        self._pool.watch(self._events.append)
        self._scheduler: Scheduler[SimSequence] = Scheduler(self._pool, parts.limits, NoDrafts())
        self._span: _Span | None = None
        self._due = 0
        self._num_arrivals = 0
        self._is_gone = False
        self.totals = Totals()

    @property
    def num_preemptions(self) -> int:
        """Sequences that lost their blocks while they ran."""
        return self._scheduler.num_preemptions

    def submit(self, task: Task, owner: object) -> SimSequence:
        """Queue a task."""
        sequence = SimSequence(task, owner, self._num_arrivals, self._agenda.now_s)
        self._num_arrivals += 1
        self._scheduler.add(sequence)
        self._disturb()
        return sequence

    def complete_import(self, sequence: SimSequence) -> None:
        """The prompt's KV and the first token have come."""
        sequence.import_prompt()
        self._scheduler.seal(sequence)
        self._scheduler.start_imported(sequence)
        if not sequence.num_left:
            self._end(sequence)
        self._disturb()

    def fail_import(self, sequence: SimSequence) -> None:
        """No KV will come: the prompt is computed here. For `on_reserved` only, as a plan follows it anyway."""
        sequence.is_import = False
        self._scheduler.requeue(sequence)

    def cancel_import(self, sequence: SimSequence) -> None:
        """Nothing will come for a sequence that waits for its KV, or for its blocks."""
        self._scheduler.remove(sequence)
        self._scheduler.free(sequence)
        if self._scheduler.num_waiting:
            self._disturb()

    def release_export(self, sequence: SimSequence) -> None:
        """The peer has read a prefill's blocks."""
        self._scheduler.free(sequence)
        if self._scheduler.num_waiting:
            self._disturb()

    def leave(self) -> None:
        """Stop for good, in the middle of a step."""
        self._is_gone = True
        span = self._span
        num_steps = self._steps_until(span, self._agenda.now_s) - 1 if span is not None else 0
        if span is not None and num_steps:
            self._count(num_steps, self._seconds(span, num_steps))
            for work in span.work:
                work.sequence.decode(num_steps)

    def _disturb(self) -> None:
        """Something came that the next step must take into account."""
        span = self._span
        if span is None:
            self._next()
            return
        span.is_repeatable = False
        if span.num_steps > 1:
            num_steps = self._steps_until(span, self._agenda.now_s)
            if num_steps < span.num_steps:
                span.num_steps = num_steps
                self._schedule(span)

    def _next(self) -> None:
        now_s = self._agenda.now_s
        while True:
            num_preemptions = self._scheduler.num_preemptions
            plan = self._scheduler.plan(now_s)
            for sequence in plan.admitted:
                self._admitted(sequence)
            did_preempt = self._scheduler.num_preemptions != num_preemptions
            if plan.work or not (did_preempt or plan.admitted):
                break
        self._tell_events()
        if plan.work:
            # An admitted sequence with one pending token has no work before the next step.
            self._begin(plan.work, is_settled=not (did_preempt or plan.admitted))
        else:
            self._span = None
            patience_s = self._scheduler.seconds_to_patience(now_s)
            if patience_s is not None:
                self._agenda.at(now_s + patience_s, self._wake, self._due)

    def _wake(self, due: int) -> None:
        if due == self._due and self._span is None and not self._is_gone:
            self._next()

    def _admitted(self, sequence: SimSequence) -> None:
        if sequence.num_cached_tokens < 0:
            sequence.num_cached_tokens = sequence.num_computed
            sequence.first_scheduled_s = self._agenda.now_s
            self.totals.num_requests += 1
            self.totals.num_prompt_tokens += sequence.num_tokens
            self.totals.num_cached_tokens += sequence.num_computed
        if sequence.is_import:
            self._sink.on_reserved(sequence)

    def _begin(self, works: list[Work[SimSequence]], is_settled: bool) -> None:
        prefills = [(work.num_tokens, work.sequence.num_computed) for work in works if work.sequence.num_pending > 1]
        self._launch(works, prefills, 1 if prefills or not is_settled else self._num_alike(works))

    def _num_alike(self, works: list[Work[SimSequence]]) -> int:
        """Steps until a sequence ends, or needs a block, or reports; 1 where one has not said its first token."""
        num_steps = MAX_SPAN_STEPS
        for work in works:
            sequence = work.sequence
            num_generated = sequence.num_generated
            if not num_generated:
                return 1
            num_places = len(sequence.block_ids) * sequence.block_size - sequence.num_tokens + 1
            num_steps = min(
                num_steps, sequence.num_left, num_places, REPORT_TOKENS - (num_generated - 1) % REPORT_TOKENS
            )
        return num_steps

    def _launch(self, works: list[Work[SimSequence]], prefills: list[tuple[int, int]], num_alike: int) -> None:
        now_s = self._agenda.now_s
        timing = self._parts.timing
        num_decodes = len(works) - len(prefills)
        num_context = sum([work.sequence.num_tokens for work in works if work.sequence.num_pending == 1])
        factor = self._parts.speed.factor(now_s)
        context_s = timing.decode_context_s
        first_s = timing.batch_s(prefills, ()) + num_decodes * timing.decode_sequence_s + num_context * context_s
        num_steps = num_alike if self._parts.may_skip else 1
        span = _Span(
            now_s, num_steps, first_s * factor, num_decodes * context_s * factor, works, is_repeatable=num_alike > 1
        )
        self._span = span
        if num_steps > 1:
            self._shorten(span)
        self._schedule(span)

    def _shorten(self, span: _Span) -> None:
        """Let the span end where steps become slower or faster, or where a request loses its patience."""
        until_s = self._parts.speed.steady_until_s(span.start_s)
        patience_s = self._scheduler.seconds_to_patience(span.start_s)
        if patience_s is not None:
            until_s = min(until_s, span.start_s + patience_s)
            span.is_repeatable = False
        if until_s < math.inf:
            span.num_steps = self._steps_until(span, until_s)

    def _steps_until(self, span: _Span, until_s: float) -> int:
        """Steps of a span up to and including the first one that ends then or later; all if none does."""
        low, high = 1, span.num_steps
        if span.start_s + self._seconds(span, high) < until_s:
            return high
        while low < high:
            middle = (low + high) // 2
            if span.start_s + self._seconds(span, middle) < until_s:
                low = middle + 1
            else:
                high = middle
        return low

    def _seconds(self, span: _Span, num_steps: int) -> float:
        step = self._parts.speed.first_step + self.totals.num_steps
        return self._parts.noise.seconds(step, num_steps, span.first_s, span.growth_s)

    def _schedule(self, span: _Span) -> None:
        self._due += 1
        self._agenda.at(span.start_s + self._seconds(span, span.num_steps), self._land, self._due)

    def _land(self, due: int) -> None:
        span = self._span
        if due != self._due or self._is_gone or span is None:
            return
        num_steps = span.num_steps
        self._count(num_steps, self._agenda.now_s - span.start_s)
        ended: list[SimSequence] = []
        for work in span.work:
            sequence = work.sequence
            if sequence.num_pending == 1 and sequence.num_generated:
                sequence.decode(num_steps)
                if sequence.num_left and not (sequence.num_generated - 1) % REPORT_TOKENS:
                    self._sink.on_tokens(sequence, REPORT_TOKENS)
            else:
                self._land_prompt(work)
            if not sequence.num_left:
                ended.append(sequence)
        for sequence in ended:
            self._end(sequence)
        self._tell_events()
        if span.is_repeatable and not ended and self._parts.may_skip and self._has_room(span.work):
            self._launch(span.work, [], self._num_alike(span.work))
        else:
            self._span = None
            self._next()

    def _count(self, num_steps: int, seconds: float) -> None:
        self.totals.num_steps += num_steps
        self.totals.busy_s += seconds

    def _has_room(self, works: list[Work[SimSequence]]) -> bool:
        return all([len(work.sequence.block_ids) >= work.sequence.num_blocks_wanted for work in works])

    def _land_prompt(self, work: Work[SimSequence]) -> None:
        sequence = work.sequence
        is_computed = sequence.compute(work.num_tokens)
        self._scheduler.seal(sequence)
        if is_computed and sequence.num_generated == 1:
            self._sink.on_first_token(sequence)

    def _end(self, sequence: SimSequence) -> None:
        self._scheduler.remove(sequence)
        if not sequence.is_prefill_only:
            self._scheduler.free(sequence)
        self._sink.on_ended(sequence)

    def _tell_events(self) -> None:
        if self._events:
            self._on_events(merged(self._events))
            self._events.clear()
