"""Requests on their way: placed by a router, sent to workers, handed over, answered, and placed again if need be.

A request is disaggregated as its decision says: prefill and decode worker get it at once, the KV moves when the prompt
has been computed and the decode worker has blocks for it; the client has the first token by then.
"""

from __future__ import annotations

import dataclasses
import math

from kelp.core.errors import CapacityError
from kelp.core.types import Role, WorkerKey
from kelp.router.decision.selector import Decision, Ended, FirstToken
from kelp.sim.agenda import Agenda
from kelp.sim.fleet import FleetSpec
from kelp.sim.job import Job, Leg
from kelp.sim.members import Member, Members
from kelp.sim.requests import SimRequest
from kelp.sim.result import OutcomeTable
from kelp.sim.routing import Routing
from kelp.sim.sequence import SimSequence, Task

LOSS_NOTICED_S = 1.0
"""From a worker's death to the end of its requests' streams, and to the end of its record."""


LEASE_S = 10.0
"""How long a finished prefill waits for a decode worker without blocks; then that one computes the prompt itself."""

_Keys = tuple[WorkerKey | None, WorkerKey]
"""Prefill and decode worker."""


class Traffic:
    """All requests that have not ended; hears what workers do (`worker_parts.RequestSink`)."""

    def __init__(
        self, agenda: Agenda, fleet: FleetSpec, block_size: int, members: Members, table: OutcomeTable
    ) -> None:
        self._agenda = agenda
        self._fleet = fleet
        self._block_size = block_size
        self._members = members
        self._table = table
        self._delay_s = fleet.network.delay_s
        self._legs: dict[Member, dict[Leg, None]] = {}

    def arrive(self, index: int, request: SimRequest, router: Routing) -> None:
        """A client's request has come to a router; refused if no worker could ever hold it."""
        num_tokens = request.num_prompt_tokens + request.num_output_tokens
        if -(-num_tokens // self._block_size) <= self._fleet.num_blocks:
            self._place(Job(index, request, router, str(index)))

    def leave(self, member: Member) -> None:
        """A worker has gone."""
        self._members.leave(member)
        due_s = self._agenda.now_s + LOSS_NOTICED_S
        self._agenda.at(due_s, self._members.publish, None)
        for leg in self._legs.pop(member, {}):
            self._agenda.at(due_s, self._lose, leg)

    def on_reserved(self, sequence: SimSequence) -> None:
        """See `RequestSink`."""
        leg = _leg_of(sequence)
        leg.sequence, leg.is_ready = sequence, True
        if leg.job.prefill is None:
            leg.member.worker.fail_import(sequence)
        else:
            self._hand_over(leg.job)

    def on_first_token(self, sequence: SimSequence) -> None:
        """See `RequestSink`."""
        leg, now_s = _leg_of(sequence), self._agenda.now_s
        job = leg.job
        leg.sequence, leg.is_ready = sequence, True
        if leg is not job.prefill and leg is not job.decode:
            return
        self._table.num_cached_tokens[job.index] = sequence.num_cached_tokens
        if job.first_token_s == math.inf:
            job.first_token_s = now_s
            self._table.first_token_s[job.index] = now_s + self._delay_s
        told = FirstToken(
            num_cached_tokens=sequence.num_cached_tokens,
            queue_s=sequence.first_scheduled_s - sequence.submitted_s,
            prefill_s=now_s - sequence.first_scheduled_s,
        )
        if leg is job.prefill and job.decode is not None:
            job.told = told
            self._agenda.at(now_s + LEASE_S, self._expire, leg)
            self._hand_over(job)
        else:
            self._agenda.at(now_s + self._delay_s, _tell_first_token, (job, told))

    def on_tokens(self, sequence: SimSequence, num_tokens: int) -> None:
        """See `RequestSink`."""
        self._agenda.at(self._agenda.now_s + self._delay_s, _tell_tokens, (_leg_of(sequence).job, num_tokens))

    def on_ended(self, sequence: SimSequence) -> None:
        """See `RequestSink`."""
        leg = _leg_of(sequence)
        job = leg.job
        is_current = leg is job.prefill or leg is job.decode
        if sequence.is_prefill_only and not (is_current and job.decode is not None):
            self._release_export(leg)
        if is_current and (leg is job.decode or job.decode is None):
            self._finish(job, leg)

    def _place(self, job: Job) -> None:
        try:
            decision = job.router.select(job.wanted(), job.avoid)
        except CapacityError:
            self._table.first_token_s[job.index] = math.inf
            return
        job.router.reserve(decision)
        job.router.commit(job.request_id)
        self._table.num_attempts[job.index] += 1
        self._agenda.at(self._agenda.now_s + self._delay_s, self._send, (job, _keys(decision)))

    def _send(self, placed: tuple[Job, _Keys]) -> None:
        job, (prefill, decode) = placed
        for key in (prefill, decode):
            if key is not None and self._members.find(key) is None:
                self._agenda.at(self._agenda.now_s + LOSS_NOTICED_S, self._retry, (job, key))
                return
        if prefill is not None:
            job.prefill = self._leg(job, prefill)
        if prefill is None or job.num_left > 1:
            job.decode = self._leg(job, decode)
        for leg in job.legs:
            role = Role.AGGREGATED if job.prefill is None else Role.PREFILL if leg is job.prefill else Role.DECODE
            task = Task(role, job.num_known_tokens, job.num_left, job.request.block_hashes, self._block_size)
            leg.sequence = leg.member.worker.submit(task, leg)

    def _leg(self, job: Job, key: WorkerKey) -> Leg:
        member = self._members.find(key)
        assert member is not None
        leg = Leg(job, member)
        self._legs.setdefault(member, {})[leg] = None
        return leg

    def _hand_over(self, job: Job) -> None:
        """Move the KV, if both sides are ready."""
        prefill, decode = job.prefill, job.decode
        if prefill is None or decode is None or job.told is None or not decode.is_ready:
            return
        assert decode.sequence is not None
        now_s = self._agenda.now_s
        factor = self._members.speeds[decode.member.index].factor(now_s)
        seconds = self._fleet.timing.handoff_s(decode.sequence.num_missing_blocks) * factor
        job.told = dataclasses.replace(job.told, transfer_s=seconds)
        prefill.is_handing_over = True
        self._agenda.at(now_s + seconds, self._handed_over, (prefill, decode))

    def _expire(self, prefill: Leg) -> None:
        """Two pools that wait for each other's blocks would wait for ever."""
        job = prefill.job
        if prefill is job.prefill and not prefill.is_handing_over and self._is_there(prefill):
            self._release_export(prefill)
            job.prefill = job.told = None

    def _handed_over(self, legs: tuple[Leg, Leg]) -> None:
        prefill, decode = legs
        job = decode.job
        if not self._is_there(prefill):
            return
        self._release_export(prefill)
        if decode is job.decode and self._is_there(decode):
            assert decode.sequence is not None
            self._agenda.at(self._agenda.now_s + self._delay_s, _tell_first_token, (job, job.told))
            decode.member.worker.complete_import(decode.sequence)

    def _release_export(self, prefill: Leg) -> None:
        assert prefill.sequence is not None
        self._forget(prefill)
        prefill.member.worker.release_export(prefill.sequence)
        prefill.sequence = None

    def _finish(self, job: Job, leg: Leg) -> None:
        now_s = self._agenda.now_s
        self._forget(leg)
        self._table.worker[job.index] = leg.member.index
        if job.prefill is not None:
            self._table.prefill_worker[job.index] = job.prefill.member.index
        self._table.end_s[job.index] = now_s + self._delay_s
        ended = Ended(True, job.request.num_output_tokens, now_s - job.first_token_s)
        self._agenda.at(now_s + self._delay_s, _tell_end, (job, ended))
        job.part()

    def _lose(self, leg: Leg) -> None:
        job = leg.job
        if leg is not job.prefill and leg is not job.decode:
            return
        for other in job.legs:
            if other is not leg and self._is_there(other):
                self._abandon(other)
        self._retry((job, leg.member.record.key))

    def _abandon(self, leg: Leg) -> None:
        """Give up what has become useless: an import that nothing will come for, or blocks that nobody will read."""
        if leg is leg.job.decode:
            assert leg.sequence is not None
            self._forget(leg)
            leg.member.worker.cancel_import(leg.sequence)
        elif leg.is_ready and not leg.is_handing_over:
            self._release_export(leg)

    def _retry(self, failure: tuple[Job, WorkerKey]) -> None:
        job, key = failure
        job.start_over(key)
        job.router.free(job.request_id, Ended(False))
        self._place(job)

    def _is_there(self, leg: Leg) -> bool:
        return self._members.find(leg.member.record.key) is leg.member

    def _forget(self, leg: Leg) -> None:
        """Nothing of it is held on its worker any more."""
        self._legs[leg.member].pop(leg, None)


def _keys(decision: Decision) -> _Keys:
    # Not the decision itself: it remembers what it was chosen from, which is much where there are many workers.
    return decision.prefill.key if decision.prefill is not None else None, decision.decode.key


def _leg_of(sequence: SimSequence) -> Leg:
    leg = sequence.owner
    assert isinstance(leg, Leg)
    return leg


def _tell_first_token(news: tuple[Job, FirstToken]) -> None:
    job, told = news
    job.router.first_token(job.request_id, told)


def _tell_tokens(news: tuple[Job, int]) -> None:
    job, num_tokens = news
    job.router.progress(job.request_id, num_tokens)


def _tell_end(news: tuple[Job, Ended]) -> None:
    job, ended = news
    job.router.free(job.request_id, ended)
