"""One sequence of a request: attempts on workers until it has ended.

Knows neither text nor the client; what it gets of tokens it hands on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from kelp.client.base import WorkerOutput
from kelp.core.errors import (
    CapacityError,
    EngineFailed,
    KelpError,
    MigrationsExceeded,
    NoWorker,
    WorkerDied,
    WorkerDraining,
    WorkerLost,
    WorkerStuck,
)
from kelp.core.metrics import RETRIES, Metrics
from kelp.core.types import FinishReason, WorkerKey
from kelp.router.attempt import Attempt, AttemptParts
from kelp.router.decision.request import RoutingRequest
from kelp.router.job import Job
from kelp.router.patience import Absence
from kelp.router.placement import Placement, Placer, key_of
from kelp.router.suspects import Stay, Suspects

_MAX_ENGINE_FAILURES = 3
"""A request in whose company so many steps fail may be the reason: it is not tried on the rest of the fleet."""

_OF_ONE_WORKER = (WorkerDied, WorkerDraining, WorkerStuck, CapacityError, EngineFailed)
"""Errors that the worker which is blamed for them has to itself, whoever it worked with."""

_RECOVERY_POLL_S = 0.25
_REST_S = 1.0
"""Before the same worker is tried again, where it is the only one left: a connection needs as long to come back."""


@dataclass(frozen=True, slots=True)
class SequenceParts:
    """What sequences share.

    Attributes:
        eos_token_ids: Ids that end a sequence.
        max_prefill_retries: Other prefill workers tried before the decode worker computes the prompt itself.
        max_migrations: Further attempts after the first one.
        recovery_wait_s: How long a sequence that has begun, or whose worker has gone, waits where no worker is left.
        absence: How long a new one does.
        suspects: Requests that may have killed a worker.
    """

    placer: Placer
    attempts: AttemptParts
    metrics: Metrics
    eos_token_ids: frozenset[int]
    max_prefill_retries: int
    max_migrations: int
    recovery_wait_s: float
    absence: Absence
    suspects: Suspects


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
        self._lost_s: dict[WorkerKey, float] = {}
        self._num_handoff_failures = 0
        self._num_engine_failures = 0
        self._was_given_up = False
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
            MigrationsExceeded: Every attempt failed, the last one not for want of room.
            PoisonRequest: Its workers die of it.
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
        num_migrations = 0
        while True:
            placement = await self._place(None if num_migrations else beside)
            self.placement, self._job.worker_ids = placement, placement.worker_ids
            stay, num_before = self._parts.suspects.stay(self._job.suspicion, placement), len(self._job.generated)
            attempt = Attempt(self._parts.attempts, self._job, placement, self._heard_in(stay))
            self._attempt = attempt
            try:
                finished = await attempt.run()
                placement.end(is_completed=True)
                return finished.finish_reason or FinishReason.ERROR
            except KelpError as error:
                self._note_failure(attempt, error)
                if not error.is_retryable:
                    raise
                ended = self._job.finish_reason(self._parts.eos_token_ids)
                if ended is not None:
                    return ended
                failure = attempt.failure
                if isinstance(error, WorkerDied) and failure is not None and failure.was_sent:
                    num_tokens = len(self._job.generated) - num_before
                    await stay.died(key_of(failure.worker), num_tokens, failure.was_heard)
                self._check_patience(num_migrations, error)
            finally:
                stay.end()
                placement.end(is_completed=self._is_stopped)
            num_migrations += 1

    def _check_patience(self, num_migrations: int, error: KelpError) -> None:
        limit = self._parts.max_migrations
        if num_migrations < limit and self._num_engine_failures < _MAX_ENGINE_FAILURES:
            return
        if isinstance(error, CapacityError):
            raise error
        raise MigrationsExceeded(
            f"given up after {num_migrations} migrations (router.max_migrations is {limit}): {error.code}: {error.text}"
        ) from error

    async def _place(self, beside: Placement | None) -> Placement:
        request = self._job.routing_request()
        if beside is not None:
            return self._parts.placer.beside(beside, request)
        allow_prefill = self._num_handoff_failures <= self._parts.max_prefill_retries

        async def find(occupied: frozenset[WorkerKey]) -> Placement:
            return await self._find(request, frozenset(self._failed) | occupied, allow_prefill)

        return await self._parts.suspects.place(self._job.suspicion, find)

    async def _find(self, request: RoutingRequest, avoid: frozenset[WorkerKey], allow_prefill: bool) -> Placement:
        """A request that resumes, or whose worker has gone, waits for room; any, a little, where nobody is there."""
        loop = asyncio.get_running_loop()
        begun_s, is_patient = loop.time(), request.is_resumed or self._was_given_up
        while True:
            try:
                placement = await self._parts.placer.place(request, avoid, allow_prefill)
            except CapacityError as error:
                if loop.time() >= begun_s + self._wait_s(request, is_patient, error):
                    raise
                with nullcontext() if is_patient else self._parts.absence.waiting():
                    await asyncio.sleep(_RECOVERY_POLL_S)
                continue
            rest_s = self._lost_s.get(key_of(placement.decode), -math.inf) + _REST_S - loop.time()
            if rest_s <= 0:
                return placement
            placement.end(is_completed=False)
            await asyncio.sleep(min(rest_s, _RECOVERY_POLL_S))

    def _wait_s(self, request: RoutingRequest, is_patient: bool, error: CapacityError) -> float:
        if is_patient:
            return self._parts.recovery_wait_s
        has_wishes = bool(request.pinned_worker or request.required_tags)
        return self._parts.absence.wait_s if isinstance(error, NoWorker) and not has_wishes else 0.0

    def _heard_in(self, stay: Stay) -> Callable[[WorkerOutput], None]:
        if not stay.is_watched:
            return self._on_output

        def on_output(output: WorkerOutput) -> None:
            stay.heard(len(output.token_ids))
            self._on_output(output)

        return on_output

    def _note_failure(self, attempt: Attempt, error: KelpError) -> None:
        if error.is_retryable:
            self._parts.metrics.add(RETRIES, reason=error.code.lower())
        if attempt.failure is not None and isinstance(error, (WorkerDied, WorkerStuck, WorkerDraining)):
            self._was_given_up = True
            self._parts.placer.leave(attempt.failure.worker)
        if attempt.failure is not None and isinstance(error, (WorkerLost, CapacityError, EngineFailed)):
            self._failed.add(key_of(attempt.failure.worker))
            if isinstance(error, WorkerLost):
                self._lost_s[key_of(attempt.failure.worker)] = asyncio.get_running_loop().time()
        if attempt.is_handoff_failure:
            self._num_handoff_failures += 1
            self._avoid_prefill_of_failed_handoff(error)
        if isinstance(error, EngineFailed):
            self._num_engine_failures += 1

    def _avoid_prefill_of_failed_handoff(self, error: KelpError) -> None:
        """Where KV did not come through, its source may be why; what a decode worker says of itself tells nothing."""
        prefill = None if self.placement is None else self.placement.prefill
        if prefill is not None and not isinstance(error, _OF_ONE_WORKER):
            self._failed.add(key_of(prefill))
