"""The step loop's body and the life of every request in it, as `executor.base` describes it.

Synchronous and single-threaded: `step` plans, runs the model, and reports. Commands may be called between steps.
Terminal events are emitted once; blocks that a peer may still touch outlive their request (`LEASED`,
`QUARANTINED`) until the worker says that the peer is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kelp.core.clock import Clock
from kelp.core.errors import DeadlineExceeded, KelpError, ProtocolError
from kelp.core.messages import RequestTimings, RequestUsage
from kelp.core.types import FinishReason
from kelp.executor.base import (
    Admitted,
    Completed,
    ExecutorEvent,
    ExecutorLoad,
    ExecutorRequest,
    Failed,
    Prefilled,
    Reserved,
    Tokens,
)
from kelp.executor.torch.batch import ModelRunner, Sampled
from kelp.executor.torch.scheduler import Plan, Scheduler, SchedulerLimits
from kelp.executor.torch.sequence import Progress, Sequence, SequenceRules, Stage
from kelp.kv.pool import BlockPool


@dataclass(frozen=True, slots=True)
class EngineRules:
    """What an engine needs to know besides its parts.

    Attributes:
        vocab_size: Bound of token ids that peers may name.
    """

    sequence: SequenceRules
    scheduler: SchedulerLimits
    vocab_size: int


class Engine:
    """All requests of one worker, one step at a time."""

    def __init__(
        self,
        runner: ModelRunner,
        pool: BlockPool,
        rules: EngineRules,
        clock: Clock,
        on_retired: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Args: `on_retired` is called with the id of each request of which nothing is held any more."""
        self._runner = runner
        self._pool = pool
        self._rules = rules
        self._clock = clock
        self._on_retired = on_retired
        self._scheduler = Scheduler(pool, rules.scheduler)
        self._sequences: dict[str, Sequence] = {}
        self._num_arrivals = 0

    @property
    def num_waiting(self) -> int:
        """Requests without blocks."""
        return self._scheduler.num_waiting

    def load(self) -> ExecutorLoad:
        """Current load; may be called from any thread."""
        return ExecutorLoad(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_free_blocks=self._pool.num_free,
            num_cached_blocks=self._pool.num_cached,
            num_preemptions=self._scheduler.num_preemptions,
        )

    def add(self, request: ExecutorRequest, arrival_ns: int) -> None:
        """Queue a validated request."""
        progress = Progress(arrival_ns=arrival_ns)
        sequence = Sequence(request, self._num_arrivals, self._rules.sequence, progress)
        self._num_arrivals += 1
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """See `Executor`."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.stage not in (Stage.LEASED, Stage.QUARANTINED):
            self._finish(sequence, _completed(sequence, FinishReason.CANCELLED))

    def complete_import(
        self, request_id: str, first_token: int, first_log_prob: float, num_transferred_blocks: int
    ) -> None:
        """See `Executor`; `first_log_prob` was already emitted by the peer and is of no use here."""
        sequence = self._after_transfer(request_id)
        if sequence is None:
            return
        if not 0 <= first_token < self._rules.vocab_size:
            sequence.is_import = False
            text = f"first_token: {first_token} is outside the vocabulary of {self._rules.vocab_size}"
            self._finish(sequence, Failed(ProtocolError(text)))
            return
        progress = sequence.progress
        progress.transferred_blocks = num_transferred_blocks
        progress.transfer_done_ns = progress.prefill_done_ns = self._clock.wall_ns()
        sequence.is_import = False
        sequence.num_computed = sequence.num_prompt_tokens
        self._scheduler.seal(sequence)
        self._scheduler.start_imported(sequence)
        reason = sequence.append(first_token)
        if reason is not None:
            self._finish(sequence, _completed(sequence, reason))

    def fail_import(self, request_id: str) -> None:
        """See `Executor`."""
        sequence = self._after_transfer(request_id)
        if sequence is not None:
            sequence.is_import = False
            self._scheduler.requeue(sequence)

    def end_import(self, request_id: str) -> None:
        """See `Executor`."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.stage is Stage.QUARANTINED:
            self._retire(sequence)

    def release_export(self, request_id: str) -> None:
        """See `Executor`."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        sequence.is_export_released = True
        if sequence.stage is Stage.LEASED:
            self._retire(sequence)

    def fail_all(self, error: KelpError) -> None:
        """Give every live request up; leased and quarantined blocks stay so."""
        for sequence in list(self._sequences.values()):
            if sequence.stage not in (Stage.LEASED, Stage.QUARANTINED):
                self._finish(sequence, Failed(error))

    def seconds_to_deadline(self) -> float | None:
        """Time until the next live request expires, at least 0; None if none will."""
        deadlines = [
            sequence.request.deadline_s
            for sequence in self._sequences.values()
            if sequence.request.deadline_s is not None and sequence.stage not in (Stage.LEASED, Stage.QUARANTINED)
        ]
        return max(0.0, min(deadlines) - self._clock.monotonic_s()) if deadlines else None

    def step(self) -> bool:
        """Expire, plan, compute, report.

        Returns:
            Whether anything happened; if not, only a command or a deadline can change that.
        """
        num_expired = self._expire()
        num_preemptions = self._scheduler.num_preemptions
        plan = self._scheduler.plan()
        for sequence in plan.admitted:
            self._report_admission(sequence)
        if plan.work:
            self._compute(plan)
        did_preempt = self._scheduler.num_preemptions != num_preemptions
        return bool(num_expired or plan.work or plan.admitted or did_preempt)

    def _compute(self, plan: Plan) -> None:
        chunks = [sequence.chunk(num_tokens) for sequence, num_tokens in plan.work]
        sampled = iter(self._runner.run(chunks))
        for (sequence, num_tokens), chunk in zip(plan.work, chunks, strict=True):
            was_prompt_computed = sequence.is_prompt_computed
            sequence.num_computed += num_tokens
            self._scheduler.seal(sequence)
            if sequence.is_prompt_computed and not was_prompt_computed:
                sequence.progress.prefill_done_ns = self._clock.wall_ns()
            self._announce(sequence)
            for _ in chunk.samples:
                self._deliver(sequence, next(sampled))

    def _report_admission(self, sequence: Sequence) -> None:
        progress = sequence.progress
        num_cached = sequence.num_computed // self._rules.sequence.block_size
        if not progress.first_scheduled_ns:
            progress.first_scheduled_ns = self._clock.wall_ns()
            progress.cached_tokens = sequence.num_computed
            progress.reused_blocks = num_cached
            _emit(sequence, Admitted(_usage(progress), progress.first_scheduled_ns))
        if sequence.is_import:
            progress.transfer_start_ns = self._clock.wall_ns()
            _emit(sequence, Reserved(tuple(sequence.block_ids), num_cached))
        self._announce(sequence)

    def _announce(self, sequence: Sequence) -> None:
        if not sequence.is_prefill_only:
            return
        block_ids = sequence.take_announceable()
        if block_ids:
            num_covered = sequence.num_announced * self._rules.sequence.block_size
            _emit(sequence, Prefilled(min(num_covered, sequence.num_prompt_tokens), tuple(block_ids)))

    def _deliver(self, sequence: Sequence, sampled: Sampled) -> None:
        progress = sequence.progress
        progress.last_token_ns = self._clock.wall_ns()
        progress.first_token_ns = progress.first_token_ns or progress.last_token_ns
        reason = sequence.append(sampled.token_id)
        _emit(sequence, Tokens((sampled.token_id,), (sampled.log_prob,)))
        if reason is not None or sequence.is_prefill_only:
            self._finish(sequence, _completed(sequence, reason))

    def _expire(self) -> int:
        now_s = self._clock.monotonic_s()
        expired = [
            sequence
            for sequence in self._sequences.values()
            if sequence.request.deadline_s is not None
            and sequence.request.deadline_s <= now_s
            and sequence.stage not in (Stage.LEASED, Stage.QUARANTINED)
        ]
        for sequence in expired:
            request = sequence.request
            text = f"{request.request_id}: deadline passed with {sequence.num_tokens} tokens"
            self._finish(sequence, Failed(DeadlineExceeded(text)))
        return len(expired)

    def _after_transfer(self, request_id: str) -> Sequence | None:
        """The sequence whose transfer just ended; an aborted one is retired instead."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        if sequence.stage is Stage.QUARANTINED:
            self._retire(sequence)
        return sequence if sequence.stage is Stage.IMPORTING else None

    def _finish(self, sequence: Sequence, event: Completed | Failed) -> None:
        stage = sequence.stage
        self._scheduler.remove(sequence)
        if stage is Stage.IMPORTING and sequence.is_import:
            sequence.stage = Stage.QUARANTINED
        elif sequence.num_announced and not sequence.is_export_released:
            sequence.stage = Stage.LEASED
        else:
            self._retire(sequence)
        _emit(sequence, event)

    def _retire(self, sequence: Sequence) -> None:
        sequence.stage = Stage.ENDED
        self._scheduler.free(sequence)
        del self._sequences[sequence.request.request_id]
        self._on_retired(sequence.request.request_id)


def _emit(sequence: Sequence, event: ExecutorEvent) -> None:
    sequence.request.sink(event)


def _usage(progress: Progress) -> RequestUsage:
    return RequestUsage(
        cached_tokens=progress.cached_tokens,
        new_blocks=progress.new_blocks,
        reused_blocks=progress.reused_blocks,
        transferred_blocks=progress.transferred_blocks,
    )


def _completed(sequence: Sequence, reason: FinishReason | None) -> Completed:
    progress = sequence.progress
    timings = RequestTimings(
        arrival_ns=progress.arrival_ns,
        first_scheduled_ns=progress.first_scheduled_ns,
        prefill_done_ns=progress.prefill_done_ns,
        transfer_start_ns=progress.transfer_start_ns,
        transfer_done_ns=progress.transfer_done_ns,
        first_token_ns=progress.first_token_ns,
        last_token_ns=progress.last_token_ns,
    )
    return Completed(reason, _usage(progress), timings)
