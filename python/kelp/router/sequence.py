"""One sequence of a request: attempts on workers until it has ended.

Knows neither text nor the client; what it gets of tokens it hands on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from kelp.client.base import WorkerOutput
from kelp.core.errors import CapacityError, KelpError, WorkerLost
from kelp.core.metrics import RETRIES, Metrics
from kelp.core.types import FinishReason, WorkerKey
from kelp.router.attempt import Attempt, AttemptParts
from kelp.router.job import Job
from kelp.router.placement import Placement, Placer, key_of

_MAX_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class SequenceParts:
    """What sequences share.

    Attributes:
        eos_token_ids: Ids that end a sequence.
        max_prefill_retries: Other prefill workers tried before the decode worker computes the prompt itself.
    """

    placer: Placer
    attempts: AttemptParts
    metrics: Metrics
    eos_token_ids: frozenset[int]
    max_prefill_retries: int


class SequenceRun:
    """Runs one job; `on_output` gets every output that brings tokens, in order, each token once.

    Attributes:
        placement: Of the latest attempt.
    """

    def __init__(self, parts: SequenceParts, job: Job, on_output: Callable[[WorkerOutput], None]) -> None:
        self._parts = parts
        self._job = job
        self._on_output = on_output
        self._failed: set[WorkerKey] = set()
        self._num_handoff_failures = 0
        self._task: asyncio.Task[object] | None = None
        self._is_stopped = False
        self._attempt: Attempt | None = None
        self.placement: Placement | None = None

    @property
    def has_decoded(self) -> bool:
        """Whether the decode worker of `placement` holds the prompt's KV: it has sent a token."""
        return self._attempt is not None and self._attempt.has_decoded

    def stop(self) -> None:
        """The sequence shall end here; belongs to the event loop."""
        self._is_stopped = True
        if self._task is not None:
            self._task.cancel()

    async def run(self, beside: Placement | None = None) -> FinishReason:
        """Run until the sequence has ended.

        Args:
            beside: Whose decode worker to try first; None leaves that to the placer, as all further attempts are.

        Raises:
            KelpError: No worker could finish the sequence.
        """
        # Stopping cancels the caller's own task for a moment: a task for each of the two costs more than a token does.
        self._task = asyncio.current_task()
        try:
            return await self._generate(beside)
        except asyncio.CancelledError:
            if not self._is_stopped:
                raise
            return FinishReason.STOP
        finally:
            self._task = None

    async def _generate(self, beside: Placement | None) -> FinishReason:
        for num_attempt in range(1, _MAX_ATTEMPTS + 1):
            placement = await self._place(beside if num_attempt == 1 else None)
            self.placement, self._job.worker_ids = placement, placement.worker_ids
            attempt = Attempt(self._parts.attempts, self._job, placement, self._on_output)
            self._attempt = attempt
            try:
                finished = await attempt.run()
                placement.end(is_completed=True)
                return finished.finish_reason or FinishReason.ERROR
            except KelpError as error:
                self._note_failure(attempt, error)
                if num_attempt == _MAX_ATTEMPTS or not error.is_retryable:
                    raise
                ended = self._job.finish_reason(self._parts.eos_token_ids)
                if ended is not None:
                    return ended
            finally:
                placement.end(is_completed=self._is_stopped)
        raise WorkerLost("no attempt was made")

    async def _place(self, beside: Placement | None) -> Placement:
        request = self._job.routing_request()
        if beside is not None:
            return self._parts.placer.beside(beside, request)
        allow_prefill = self._num_handoff_failures <= self._parts.max_prefill_retries
        return await self._parts.placer.place(request, frozenset(self._failed), allow_prefill)

    def _note_failure(self, attempt: Attempt, error: KelpError) -> None:
        if error.is_retryable:
            self._parts.metrics.add(RETRIES, reason=error.code.lower())
        if attempt.failed_worker is not None and isinstance(error, (WorkerLost, CapacityError)):
            self._failed.add(key_of(attempt.failed_worker))
        if attempt.is_handoff_failure:
            self._num_handoff_failures += 1
