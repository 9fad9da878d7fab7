"""The step loop's body and the life of every request in it, as `executor.base` describes it.

Synchronous and single-threaded: `step` plans, runs the model, and reports. Commands may be called between steps.
Terminal events are emitted once; blocks that a peer may still touch outlive their request (`LEASED`,
`QUARANTINED`) until the worker says that the peer is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kelp.core.clock import Clock
from kelp.core.errors import DeadlineExceeded, InvalidRequest, KelpError, ProtocolError
from kelp.core.types import FinishReason
from kelp.executor.base import Completed, ExecutorEvent, ExecutorLoad, ExecutorRequest, Failed
from kelp.executor.batching.batch import ModelRunner
from kelp.executor.batching.drafts import DraftProposer, NgramProposer
from kelp.executor.batching.flights import Flights
from kelp.executor.batching.guide import Guide
from kelp.executor.batching.history import SequenceRules
from kelp.executor.batching.offers import SealOffers
from kelp.executor.batching.progress import Progress
from kelp.executor.batching.schedulable import Stage
from kelp.executor.batching.scheduler import Scheduler, SchedulerLimits
from kelp.executor.batching.sequence import Sequence
from kelp.executor.batching.speculation import Speculation, SpeculationRules
from kelp.executor.batching.steps import Outcome, Steps
from kelp.kv.pool import BlockPool

_NGRAMS = NgramProposer()


@dataclass(frozen=True, slots=True)
class EngineRules:
    """What an engine needs to know besides its parts.

    Attributes:
        vocab_size: Bound of token ids that peers may name.
        max_in_flight: Steps that may be launched before the first has to land: 1, or 2 where the device computes
            while the host plans.
    """

    sequence: SequenceRules
    scheduler: SchedulerLimits
    vocab_size: int
    speculation: SpeculationRules = SpeculationRules()
    max_in_flight: int = 1


class Engine:
    """All requests of one worker, one step at a time.

    Attributes:
        offers: Tells of final blocks, if somebody watches.
    """

    def __init__(
        self,
        runner: ModelRunner,
        pool: BlockPool,
        rules: EngineRules,
        clock: Clock,
        on_retired: Callable[[str], None] = lambda _: None,
        proposer: DraftProposer = _NGRAMS,
    ) -> None:
        """Args: `on_retired` is called with the id of each request of which nothing is held any more."""
        self._pool = pool
        self._rules = rules
        self._clock = clock
        self._on_retired = on_retired
        self._speculation = Speculation(rules.speculation, proposer)
        self.offers = SealOffers(pool)
        self._scheduler = Scheduler(pool, rules.scheduler, self._speculation, self.offers)
        self._steps = Steps(Flights(runner, rules.max_in_flight), self._scheduler, self._speculation, clock)
        self._sequences: dict[str, Sequence] = {}
        self._retiring: list[Sequence] = []
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
            num_draft_tokens=self._speculation.num_draft_tokens,
            num_accepted_tokens=self._speculation.num_accepted_tokens,
        )

    def add(self, request: ExecutorRequest, arrival_ns: int, guide: Guide | None = None) -> None:
        """Queue a validated request; `guide` has accepted its earlier output."""
        progress = Progress(arrival_ns=arrival_ns)
        sequence = Sequence(request, self._num_arrivals, self._rules.sequence, progress, guide)
        self._num_arrivals += 1
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """See `Executor`."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.is_live:
            self._finish(sequence, sequence.progress.completed(FinishReason.CANCELLED))

    def complete_import(
        self, request_id: str, first_token: int, first_log_prob: float, num_transferred_blocks: int
    ) -> None:
        """See `Executor`; `first_log_prob` was already emitted by the peer and is of no use here."""
        if not 0 <= first_token < self._rules.vocab_size:
            text = f"first_token: {first_token} is outside the vocabulary of {self._rules.vocab_size}"
            self.reject_import(request_id, ProtocolError(text))
            return
        sequence = self._after_transfer(request_id)
        if sequence is None:
            return
        progress = sequence.progress
        progress.transferred_blocks = num_transferred_blocks
        progress.transfer_done_ns = progress.prefill_done_ns = self._clock.wall_ns()
        sequence.import_prompt()
        self._scheduler.seal(sequence)
        self._scheduler.start_imported(sequence)
        reason = sequence.history.append(first_token)
        if reason is not None:
            self._finish(sequence, _ending(sequence, reason))

    def complete_onboard(self, request_id: str, num_blocks: int) -> None:
        """See `TieredExecutor`."""
        sequence = self._after_transfer(request_id)
        if sequence is None:
            return
        sequence.onboard(num_blocks)
        self._scheduler.seal(sequence, is_known_below=True)
        self._scheduler.start_imported(sequence)
        self._steps.announce(sequence)

    def reject_import(self, request_id: str, error: KelpError) -> None:
        """What was put into the reserved blocks is not what was asked for: fail the request, free the blocks."""
        sequence = self._after_transfer(request_id)
        if sequence is not None:
            sequence.is_import = False
            sequence.num_onboardable = 0
            self._finish(sequence, Failed(error))

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
            self._let_go(sequence)

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
            if sequence.is_live:
                self._finish(sequence, Failed(error))

    def seconds_to_wake(self) -> float | None:
        """How long an idle engine stays so without commands, at least 0; None for ever."""
        now_s = self._clock.monotonic_s()
        waits = [
            max(0.0, sequence.request.deadline_s - now_s)
            for sequence in self._sequences.values()
            if sequence.request.deadline_s is not None and sequence.is_live
        ]
        patience_s = self._scheduler.seconds_to_patience(now_s)
        return min(waits if patience_s is None else [*waits, patience_s], default=None)

    def step(self) -> bool:
        """Expire, and let the device and the sequences get on.

        Returns:
            Whether anything happened; if not, a command or time must pass (`seconds_to_wake`) before anything can.
        """
        num_expired = self._expire()
        try:
            outcome = self._steps.advance()
        finally:
            self._retire_landed()
        self._end(outcome)
        self.offers.tell()
        return bool(num_expired) or not outcome.is_idle

    def land_all(self) -> None:
        """Wait for everything that is in flight; to be called before the engine is given up."""
        outcome = self._steps.land_all()
        self._retire_landed()
        self._end(outcome)

    def _end(self, outcome: Outcome) -> None:
        for sequence, reason in outcome.ended:
            self._finish(sequence, _ending(sequence, reason))

    def _expire(self) -> int:
        now_s = self._clock.monotonic_s()
        expired = [
            sequence
            for sequence in self._sequences.values()
            if sequence.request.deadline_s is not None and sequence.request.deadline_s <= now_s and sequence.is_live
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
            self._let_go(sequence)
        return sequence if sequence.stage is Stage.IMPORTING else None

    def _retire_landed(self) -> None:
        retiring, self._retiring = self._retiring, []
        for sequence in retiring:
            self._retire(sequence)

    def _finish(self, sequence: Sequence, event: Completed | Failed) -> None:
        stage = sequence.stage
        self._scheduler.remove(sequence)
        if stage is Stage.IMPORTING and (sequence.is_import or sequence.num_onboardable):
            sequence.stage = Stage.QUARANTINED
        else:
            self._let_go(sequence)
        _emit(sequence, event)

    def _let_go(self, sequence: Sequence) -> None:
        """Nobody writes into the blocks any more."""
        if sequence.num_announced and not sequence.is_export_released:
            sequence.stage = Stage.LEASED
        else:
            self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        if sequence.num_flights:
            sequence.stage = Stage.RETIRING
            self._retiring.append(sequence)
            return
        sequence.stage = Stage.ENDED
        self._scheduler.free(sequence)
        del self._sequences[sequence.request.request_id]
        self._on_retired(sequence.request.request_id)


def _ending(sequence: Sequence, reason: FinishReason | None) -> Completed | Failed:
    if reason is FinishReason.ERROR and sequence.guide is not None:
        return Failed(InvalidRequest(f"guided_decoding_guide (or structured_outputs): {sequence.guide.error}"))
    return sequence.progress.completed(reason)


def _emit(sequence: Sequence, event: ExecutorEvent) -> None:
    sequence.request.sink(event)
