"""Which tokens of which sequences the next step computes, and who gets blocks.

Policy: decodes first, in order of arrival, then prompt chunks first come first served, then admissions, under one
token budget. A sequence is admitted only with blocks for everything it knows so far, so a prompt never waits
half-way; only decoding grows. Growth that finds no block preempts the latest-arrived sequence that no peer reads
or writes (possibly the growing one itself), which recomputes later. The earliest arrival is never taken from, and
whatever cannot be preempted needs no further block, so there is always somebody who can finish.

Decides and keeps the books; emits no events, runs no model.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from kelp.executor.torch.sequence import Sequence, Stage
from kelp.kv.pool import BlockPool


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step."""

    max_step_tokens: int
    max_running: int
    enable_prefix_cache: bool


@dataclass(slots=True)
class Plan:
    """One step: `work` in batch order; `admitted` are new in this step, imports (no work yet) included."""

    work: list[tuple[Sequence, int]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Queue, running set and block ownership of one engine."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self._pool = pool
        self._limits = limits
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._importing: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot: computing, or waiting for their import."""
        return len(self._running) + len(self._importing)

    def add(self, sequence: Sequence) -> None:
        """Queue by arrival."""
        sequence.stage = Stage.WAITING
        insort(self._waiting, sequence, key=_arrival)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of whatever set it is in; its blocks stay with it."""
        for members in (self._waiting, self._running, self._importing):
            if sequence in members:
                members.remove(sequence)

    def start_imported(self, sequence: Sequence) -> None:
        """Let a sequence whose import is complete take part in steps."""
        self._importing.remove(sequence)
        self._run(sequence)

    def requeue(self, sequence: Sequence) -> None:
        """Take the blocks back and queue the sequence again."""
        self.remove(sequence)
        self.free(sequence)
        self.add(sequence)

    def free(self, sequence: Sequence) -> None:
        """Give a sequence's blocks back."""
        self._pool.release(sequence.surrender())

    def seal(self, sequence: Sequence) -> None:
        """Make the full blocks whose KV became final known to the prefix cache."""
        if self._limits.enable_prefix_cache:
            for block_id, sequence_hash in sequence.take_sealable():
                self._pool.seal(block_id, sequence_hash)

    def plan(self) -> Plan:
        """Choose the next step's work; allocates, preempts and admits."""
        plan = Plan()
        num_preemptions = self.num_preemptions
        budget = self._plan_decodes(plan, self._limits.max_step_tokens)
        budget = self._plan_prefills(plan, budget)
        if self.num_preemptions == num_preemptions:
            self._admit(plan, budget)
        return plan

    def _plan_decodes(self, plan: Plan, budget: int) -> int:
        for sequence in [member for member in self._running if member.num_pending == 1]:
            if budget and sequence.stage is Stage.RUNNING and self._grow(sequence):
                plan.work.append((sequence, 1))
                budget -= 1
        return budget

    def _plan_prefills(self, plan: Plan, budget: int) -> int:
        for sequence in self._running:
            if sequence.num_pending > 1 and budget:
                num_tokens = min(sequence.num_pending, budget)
                plan.work.append((sequence, num_tokens))
                budget -= num_tokens
        return budget

    def _admit(self, plan: Plan, budget: int) -> None:
        while self._waiting and self.num_running < self._limits.max_running:
            sequence = self._waiting[0]
            if (not budget and not sequence.is_import) or not self._equip(sequence):
                return
            del self._waiting[0]
            plan.admitted.append(sequence)
            if sequence.is_import:
                sequence.stage = Stage.IMPORTING
                self._importing.append(sequence)
                continue
            self._run(sequence)
            num_tokens = min(sequence.num_pending, budget)
            plan.work.append((sequence, num_tokens))
            budget -= num_tokens

    def _equip(self, sequence: Sequence) -> bool:
        """Cached and new blocks for all known tokens, leaving one to grow into for every running sequence."""
        hashes = sequence.matchable_hashes() if self._limits.enable_prefix_cache else []
        matched = self._pool.match(hashes)
        num_missing = sequence.num_blocks_wanted - len(matched)
        headroom = sum(1 for _ in self._growing())
        if num_missing + headroom > self._pool.num_available:
            self._pool.release(matched)
            return False
        sequence.adopt(matched, self._pool.allocate(num_missing))
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """One more block if the next token needs it; False if the sequence itself was preempted for it."""
        while len(sequence.block_ids) < sequence.num_blocks_wanted:
            if self._pool.num_available:
                sequence.block_ids += self._pool.allocate(1)
                sequence.progress.new_blocks += 1
                continue
            victim = max(self._growing(), key=_arrival)
            self.requeue(victim)
            self.num_preemptions += 1
            if victim is sequence:
                return False
        return True

    def _growing(self) -> Iterator[Sequence]:
        return (sequence for sequence in self._running if sequence.is_preemptible)

    def _run(self, sequence: Sequence) -> None:
        sequence.stage = Stage.RUNNING
        insort(self._running, sequence, key=_arrival)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
