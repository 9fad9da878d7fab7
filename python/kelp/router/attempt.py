"""One try at a request on chosen workers, aggregated or disaggregated."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from kelp.client.base import WorkerAddress, WorkerClient, WorkerOutput, WorkerStream
from kelp.core.clock import Clock
from kelp.core.errors import InternalError, KelpError, ProtocolError, WorkerDied, WorkerLost, WorkerStuck
from kelp.core.messages import Finished, GenerateCommand, Rendezvous
from kelp.core.types import HandoffShape, Role, WorkerState
from kelp.registry.base import WorkerRecord
from kelp.router.job import Job
from kelp.router.patience import Patience, is_overdue
from kelp.router.placement import Placement, WorkersView, key_of

_log = logging.getLogger(__name__)
_LIVENESS_CHECK_S = 1.0
_End = KelpError | None


def address_of(record: WorkerRecord) -> WorkerAddress:
    """Where a worker listens."""
    return WorkerAddress(record.endpoint, record.model_name, record.direct_endpoint, record.epoch)


@dataclass(frozen=True, slots=True)
class AttemptParts:
    """What attempts share.

    Attributes:
        retire: Takes streams that nobody reads any more and closes them in the background.
    """

    client: WorkerClient
    view: WorkersView
    clock: Clock
    patience: Patience
    retire: Callable[[WorkerStream], None]


@dataclass(frozen=True, slots=True)
class Failure:
    """Whose error ended an attempt.

    Attributes:
        was_sent: The worker had been sent its command.
        was_heard: It had said something, if only a receipt.
    """

    worker: WorkerRecord
    was_sent: bool
    was_heard: bool


class WorkerLeg:
    """One worker's part in an attempt: keeps what it says until somebody follows it, then hands it on as it comes.

    Nothing waits in between: outputs pass from the connection's reading to whoever follows. A Triton server does not
    notice when the process behind a model dies, its streams just hang, and a network may silently part: a silent worker
    is given up as soon as nobody listens at its own socket, its heartbeat stops, or at the idle timeout. One that says
    nothing but that it lives is given up when its next token is overdue.

    Attributes:
        has_spoken: The worker has said something, if only a receipt.
    """

    def __init__(self, parts: AttemptParts, record: WorkerRecord, is_overdue: Callable[[float], bool]) -> None:
        self._parts = parts
        self._record = record
        self._is_overdue = is_overdue
        self._address = address_of(record)
        self._stream: WorkerStream | None = None
        self._kept: list[WorkerOutput | _End] = []
        self._on_output: Callable[[WorkerOutput], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[Finished] = self._loop.create_future()
        self._last_heard_s = self._last_token_s = self._loop.time()
        self._has_said_token = False
        self.has_spoken = False
        self._timer = self._loop.call_later(_LIVENESS_CHECK_S, self._check_liveness)

    def begin(self, command: GenerateCommand, prompt: npt.NDArray[np.int32]) -> None:
        """Send the command.

        Raises:
            WorkerDied: The worker is known to have gone.
        """
        self._stream = self._parts.client.generate(self._address, command, prompt, self._receive)

    async def follow(self, on_output: Callable[[WorkerOutput], None]) -> Finished:
        """Hand everything said on, from the start, until the worker has finished.

        Raises:
            KelpError: The worker's own error, or WorkerLost.
        """
        self._on_output = on_output
        kept, self._kept = self._kept, []
        for item in kept:
            self._hand_on(item)
        return await self._finished

    def leave(self) -> None:
        """Lose interest; what still runs is cancelled, and read to its end, in the background."""
        self._timer.cancel()
        self._finished.cancel()
        if self._stream is not None and not self._stream.has_ended:
            self._parts.retire(self._stream)

    def _receive(self, item: WorkerOutput | _End) -> None:
        self._last_heard_s = now_s = self._loop.time()
        if isinstance(item, WorkerOutput):
            self.has_spoken = True
            if item.token_ids:
                self._last_token_s, self._has_said_token = now_s, True
        self._hand_on(item)

    def _hand_on(self, item: WorkerOutput | _End) -> None:
        if self._on_output is None:
            self._kept.append(item)
        elif not self._finished.done():
            try:
                self._take(item, self._on_output)
            except KelpError as error:
                self._finished.set_exception(error)
            except Exception as error:
                # Whoever follows must hear of the end, and the connection's other requests must not.
                _log.exception("an output of worker %s could not be handled", self._record.worker_id)
                self._finished.set_exception(InternalError(f"{type(error).__name__}: {error}"))

    def _take(self, item: WorkerOutput | _End, on_output: Callable[[WorkerOutput], None]) -> None:
        if item is None:
            raise WorkerLost(f"worker {self._record.worker_id} ended the stream without saying how")
        if isinstance(item, KelpError):
            raise item
        on_output(item)
        if isinstance(item.event, Finished):
            self._finished.set_result(item.event)

    def _check_liveness(self) -> None:
        lost = self._why_lost()
        if lost is not None:
            self._hand_on(lost)
        else:
            self._timer = self._loop.call_later(_LIVENESS_CHECK_S, self._check_liveness)

    def _why_lost(self) -> WorkerLost | None:
        now_s, name, patience = self._loop.time(), self._record.worker_id, self._parts.patience
        silent_s, tokenless_s = now_s - self._last_heard_s, now_s - self._last_token_s
        if self._parts.client.has_gone(self._address):
            return WorkerDied(f"worker {name} no longer listens at {self._record.direct_endpoint}")
        if silent_s >= _LIVENESS_CHECK_S and not self._parts.view.is_alive(name, self._record.epoch):
            known = self._parts.view.records()
            has_successor = any(other.worker_id == name and other.epoch != self._record.epoch for other in known)
            return (WorkerDied if has_successor else WorkerLost)(f"worker {name} stopped its heartbeat")
        if silent_s >= patience.silence_s:
            return WorkerLost(f"worker {name} was silent for {silent_s:.0f} s")
        if tokenless_s >= (patience.next_token_s if self._has_said_token else patience.first_token_s):
            return WorkerStuck(f"worker {name} lives, but has said no token for {tokenless_s:.0f} s")
        if self._is_overdue(tokenless_s):
            return WorkerLost(f"worker {name} has said no token for {tokenless_s:.0f} s, all that the deadline leaves")
        return None


class Attempt:
    """Runs a job once; `on_output` gets every output that brings tokens, in order, each token once.

    Attributes:
        failure: Where it failed, if it did.
        has_decoded: The decode worker has sent a token: the prompt's KV is there, wherever it was computed.
    """

    def __init__(
        self, parts: AttemptParts, job: Job, placement: Placement, on_output: Callable[[WorkerOutput], None]
    ) -> None:
        self._parts = parts
        self._job = job
        self._placement = placement
        self._on_output = on_output
        self._prompt = job.tokens()
        self._num_generated = len(job.generated)
        self._legs: list[WorkerLeg] = []
        self.has_decoded = False
        self.failure: Failure | None = None

    @property
    def is_handoff_failure(self) -> bool:
        """Whether remote prefill or the way of its KV, not the decoding, went wrong."""
        return self._placement.prefill is not None and not self.has_decoded

    async def run(self) -> Finished:
        """Run to the end of the sequence.

        Raises:
            KelpError: The attempt failed; `failure` says where.
        """
        try:
            if self._placement.prefill is None:
                leg = self._start(self._placement.decode, Role.AGGREGATED, None)
                return await self._follow(leg, self._placement.decode)
            return await self._disaggregated(self._placement.prefill)
        finally:
            for leg in self._legs:
                leg.leave()

    async def _disaggregated(self, prefill: WorkerRecord) -> Finished:
        rendezvous = Rendezvous(
            handoff_id=uuid.uuid4().hex, endpoint=prefill.handoff_endpoint, prefill_epoch=prefill.epoch
        )
        decode = self._placement.decode
        prefill_leg = self._start(prefill, Role.PREFILL, rendezvous)
        decode_leg = None
        if prefill.handoff_shape is HandoffShape.RENDEZVOUS:
            decode_leg = self._start(decode, Role.DECODE, rendezvous)
        finished = await self._follow(prefill_leg, prefill)
        if finished.finish_reason is not None:
            return finished
        if decode_leg is None:
            ticket = finished.rendezvous
            if ticket is None:
                raise ProtocolError(f"worker {prefill.worker_id} returned no ticket")
            decode_leg = self._start(decode, Role.DECODE, ticket)
        return await self._follow(decode_leg, decode)

    def _start(self, record: WorkerRecord, role: Role, rendezvous: Rendezvous | None) -> WorkerLeg:
        known_blocks = self._placement.decision.known_blocks
        command = self._job.command(role, rendezvous, self._num_generated, known_blocks)
        leg = WorkerLeg(self._parts, record, partial(self._is_overdue, record))
        self._legs.append(leg)
        try:
            leg.begin(command, self._prompt)
        except KelpError:
            self.failure = Failure(record, was_sent=False, was_heard=False)
            raise
        self._placement.sent()
        return leg

    def _is_overdue(self, record: WorkerRecord, tokenless_s: float) -> bool:
        """Never where nobody else could do it: then even a late answer is better than none."""
        decision, left_s = self._placement.decision, self._job.deadline_s - time.monotonic()
        if decision.request.pinned_worker or not is_overdue(tokenless_s, left_s, decision.ttft_s):
            return False
        others = (other for other in self._parts.view.records() if key_of(other) != key_of(record))
        # What a prefill worker does the decode worker can do as well.
        return record is self._placement.prefill or any(
            other.role is record.role and other.state is WorkerState.READY for other in others
        )

    async def _follow(self, leg: WorkerLeg, record: WorkerRecord) -> Finished:
        try:
            return await leg.follow(partial(self._take, record))
        except KelpError:
            self.failure = Failure(record, was_sent=True, was_heard=leg.has_spoken)
            raise

    def _take(self, record: WorkerRecord, output: WorkerOutput) -> None:
        self._note(output, record)
        if output.token_ids:
            self._job.generated.extend(output.token_ids)
            self._job.last_received_ns = self._parts.clock.wall_ns()
            self._on_output(output)
        # After the tokens have been passed on: the books can wait, the client's first token cannot.
        self._placement.heard(output)

    def _note(self, output: WorkerOutput, record: WorkerRecord) -> None:
        if record is self._placement.decode:
            self.has_decoded = self.has_decoded or bool(output.token_ids)
        if output.event is None:
            return
        if record is self._placement.prefill:
            self._job.prefill_event = output.event
        else:
            self._job.decode_event = output.event
