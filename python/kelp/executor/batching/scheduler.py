"""Which tokens of which sequences the next step computes, and who gets blocks.

Policy: decodes first, in order of arrival, then prompts, which share what is left of one token budget (`shares`), then
drafts behind the decodes. A sequence is admitted, in order of arrival, only with blocks for everything it knows so
far, so a prompt never waits half-way; only decoding grows. It is passed over while another one makes the next block
that it needs; an import or onboarding, whose peer may hang, is believed to make its blocks for a second only.

Growth that finds no block preempts the latest-arrived sequence that no peer reads or writes (possibly the growing one
itself), which recomputes later. The earliest arrival is never taken from, and whatever cannot be preempted needs no
further block, so there is always somebody who can finish. Drafts take no block that growth might need.

Decides and keeps the books; emits no events, runs no model.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import Generic

from kelp.core.types import BlockId, num_blocks_for
from kelp.executor.batching.prefixes import PromisedBlocks
from kelp.executor.batching.schedulable import Drafting, Offering, Schedulable, SchedulableT, Stage
from kelp.executor.batching.shares import share_out
from kelp.kv.pool import BlockPool

_IMPORT_PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step; `max_step_tokens` is at least `max_running`, so that every decode has its place."""

    max_step_tokens: int
    max_running: int
    enable_prefix_cache: bool


@dataclass(slots=True)
class Work(Generic[SchedulableT]):
    """One sequence's part of a step: pending tokens, and drafts behind them."""

    sequence: SchedulableT
    num_tokens: int
    num_drafts: int = 0


@dataclass(slots=True)
class Plan(Generic[SchedulableT]):
    """One step.

    Attributes:
        now_s: When it was made, by the engine's monotonic clock.
        work: In batch order.
        admitted: New in this step, imports and onboardings (no work yet) included.
        is_short: Blocks must be taken from a sequence that is in flight: nothing can be planned before that landed.
    """

    now_s: float = 0.0
    work: list[Work[SchedulableT]] = field(default_factory=list)
    admitted: list[SchedulableT] = field(default_factory=list)
    is_short: bool = False


class Scheduler(Generic[SchedulableT]):
    """Queue, running set and block ownership of one engine.

    Args:
        offers: See `Offering`.
    """

    def __init__(
        self,
        pool: BlockPool,
        limits: SchedulerLimits,
        speculation: Drafting[SchedulableT],
        offers: Offering[SchedulableT] | None = None,
    ) -> None:
        self._offers = offers
        self._pool = pool
        self._limits = limits
        self._speculation = speculation
        self._promised = PromisedBlocks()
        self._waiting: list[SchedulableT] = []
        self._running: list[SchedulableT] = []
        self._importing: list[SchedulableT] = []
        self._num_growing = 0
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot: computing, or waiting for KV that is brought."""
        return len(self._running) + len(self._importing)

    def add(self, sequence: SchedulableT) -> None:
        """Queue by arrival."""
        sequence.stage = Stage.WAITING
        insort(self._waiting, sequence, key=_arrival)

    def remove(self, sequence: SchedulableT) -> None:
        """Take a sequence out of whatever set it is in; its blocks stay with it."""
        self._promised.withdraw(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
            self._num_growing -= _is_growing(sequence)
        for members in (self._waiting, self._importing):
            if sequence in members:
                members.remove(sequence)

    def start_imported(self, sequence: SchedulableT) -> None:
        """Let a sequence whose import or onboarding is complete take part in steps."""
        self._importing.remove(sequence)
        self._run(sequence)

    def requeue(self, sequence: SchedulableT) -> None:
        """Take the blocks back and queue the sequence again."""
        self.remove(sequence)
        self.free(sequence)
        self.add(sequence)

    def free(self, sequence: SchedulableT) -> None:
        """Give a sequence's blocks back."""
        self._pool.release(sequence.surrender())

    def seal(self, sequence: SchedulableT, is_known_below: bool = False) -> None:
        """Make the full blocks whose KV became final known to the prefix cache, and to lower tiers if they are not."""
        if self._limits.enable_prefix_cache:
            run = sequence.take_sealable()
            if run is not None:
                self._pool.seal_run(run.block_ids, run.hashes, run.parent)
                self._promised.keep(run.hashes)
                if self._offers is not None and not is_known_below:
                    self._offers.sealed(sequence, run)

    def seconds_to_patience(self, now_s: float) -> float | None:
        """Time until requests no longer wait for a block of some import; None if none does."""
        ends = [sequence.promise_end_s for sequence in self._importing if sequence.promise_end_s is not None]
        return max(0.0, min(ends) - now_s) if ends and self._waiting else None

    def plan(self, now_s: float) -> Plan[SchedulableT]:
        """Choose the next step's work; allocates, preempts and admits."""
        self._lose_patience(now_s)
        plan: Plan[SchedulableT] = Plan(now_s)
        num_preemptions = self.num_preemptions
        self._plan_decodes(plan)
        if not plan.is_short:
            if self.num_preemptions == num_preemptions:
                self._admit(plan)
            decodes = list(plan.work)
            budget = self._plan_prefills(plan, self._limits.max_step_tokens - len(decodes))
            if self._speculation.may_draft:
                self._plan_drafts(decodes, budget)
        return plan

    def _plan_decodes(self, plan: Plan[SchedulableT]) -> None:
        members = [member for member in self._running if member.num_pending == 1]
        for sequence in members:
            if sequence.stage is not Stage.RUNNING:
                continue
            if sequence.num_foreseen and self._must_be_known(sequence, len(members)):
                continue
            if len(sequence.block_ids) < sequence.num_blocks_wanted and not self._grow(sequence, plan):
                return
            if sequence.stage is Stage.RUNNING:
                plan.work.append(Work(sequence, 1))

    def _lose_patience(self, now_s: float) -> None:
        for sequence in self._importing:
            if sequence.promise_end_s is not None and sequence.promise_end_s <= now_s:
                sequence.promise_end_s = None
                self._promised.withdraw(sequence)

    def _must_be_known(self, sequence: SchedulableT, num_decodes: int) -> bool:
        """Whether the step after the token in flight needs to know which it is."""
        return not sequence.is_foreseeable or self._speculation.num_worthwhile(sequence, num_decodes) > 0

    def _plan_prefills(self, plan: Plan[SchedulableT], budget: int) -> int:
        prefills = [sequence for sequence in self._running if sequence.num_pending > 1]
        if not prefills:
            return budget
        shares = share_out([sequence.num_pending for sequence in prefills], budget)
        for sequence, num_tokens in zip(prefills, shares, strict=True):
            if num_tokens:
                plan.work.append(Work(sequence, num_tokens))
        return budget - sum(shares)

    def _plan_drafts(self, decodes: list[Work[SchedulableT]], budget: int) -> None:
        drafting: list[Work[SchedulableT]] = []
        limits: list[int] = []
        for work in decodes:
            limit = min(budget, self._speculation.num_worthwhile(work.sequence, len(decodes)))
            if limit > 0 and not work.sequence.num_foreseen:
                drafting.append(work)
                limits.append(limit)
                budget -= limit
        if drafting:
            nums_drafts = self._speculation.draft([work.sequence for work in drafting], limits)
            for work, num_drafts in zip(drafting, nums_drafts, strict=True):
                work.num_drafts = self._make_room(work.sequence, num_drafts)

    def _make_room(self, sequence: SchedulableT, num_drafts: int) -> int:
        """How many of some drafts have a place in the sequence's blocks, or in a block to spare."""
        size = sequence.block_size
        num_places = len(sequence.block_ids) * size - sequence.num_tokens
        num_spare = max(0, self._pool.num_available - self._num_growing)
        num_blocks = min(num_blocks_for(max(0, num_drafts - num_places), size), num_spare)
        if num_blocks:
            sequence.extend(self._pool.allocate(num_blocks))
        return min(num_drafts, num_places + num_blocks * size)

    def _admit(self, plan: Plan[SchedulableT]) -> None:
        for sequence in list(self._waiting):
            if self.num_running >= self._limits.max_running:
                return
            if sequence.awaited_hash is not None and sequence.awaited_hash in self._promised:
                continue
            hashes = sequence.matchable_hashes() if self._limits.enable_prefix_cache else []
            matched = self._pool.match(hashes)
            sequence.awaited_hash = next(iter(hashes[len(matched) :]), None)
            if sequence.awaited_hash is not None and sequence.awaited_hash in self._promised:
                self._pool.release(matched)
                continue
            if not self._equip(sequence, matched):
                return
            if sequence.stage is Stage.IMPORTING:
                sequence.promise_end_s = plan.now_s + _IMPORT_PATIENCE_S
            plan.admitted.append(sequence)

    def _equip(self, sequence: SchedulableT, matched: list[BlockId]) -> bool:
        """Admit with blocks for all known tokens, if they leave one to grow into for every running sequence."""
        num_missing = sequence.num_blocks_wanted - len(matched)
        if num_missing + self._num_growing > self._pool.num_available:
            self._pool.release(matched)
            return False
        sequence.adopt(matched, self._pool.allocate(num_missing))
        self._waiting.remove(sequence)
        if self._limits.enable_prefix_cache:
            self._promised.promise(sequence, sequence.full_hashes()[len(matched) :])
        if sequence.is_import or sequence.num_onboardable > len(matched):
            sequence.stage = Stage.IMPORTING
            self._importing.append(sequence)
        else:
            self._run(sequence)
        return True

    def _grow(self, sequence: SchedulableT, plan: Plan[SchedulableT]) -> bool:
        """One more block if the next token needs it, for which the sequence itself may be preempted.

        Returns:
            Whether that was settled; if not, the plan is short.
        """
        while len(sequence.block_ids) < sequence.num_blocks_wanted:
            if self._pool.num_available or (self._offers is not None and self._offers.yield_kept()):
                sequence.extend(self._pool.allocate(1))
                continue
            victim = max(filter(_is_growing, self._running), key=_arrival)
            if victim.num_flights:
                plan.is_short = True
                return False
            self.requeue(victim)
            self.num_preemptions += 1
            if victim is sequence:
                return True
        return True

    def _run(self, sequence: SchedulableT) -> None:
        sequence.stage = Stage.RUNNING
        insort(self._running, sequence, key=_arrival)
        self._num_growing += _is_growing(sequence)


def _arrival(sequence: Schedulable) -> int:
    return sequence.arrival


def _is_growing(sequence: Schedulable) -> bool:
    """Of a running sequence: constant for as long as it runs."""
    return sequence.is_preemptible
