"""The default: keeps what is likely to be wanted soon and dear to compute, judged by what happened to blocks like it.

Value of a block = worth of its class at its age (`hazards`) x cost of computing it, which grows with its position. Its
class is how often it was used, remembered for a while after it has left. Only leaves go (`leaves`).

The learned values decide only where much is to be won by them (`prospect`). Else, and until something has been missed,
the order is that of `lru`, exactly: in a tier that is large for what it is used for there is little to learn from.

Time is counted in blocks that come; a hit counts for a fifth, so that a tier that is hit all the time ages too.
Amortised O(log n) per call, memory bounded by `_GHOSTS_PER_SLOT`, no randomness.
"""

from __future__ import annotations

from kelp.core.types import SequenceHash
from kelp.kv.eviction.base import BlockFacts, HeldCheck
from kelp.kv.eviction.cohorts import Cohorts, cost_step
from kelp.kv.eviction.leaves import LeafQueue
from kelp.kv.eviction.lru import LruPolicy
from kelp.kv.eviction.prospect import Prospect
from kelp.kv.eviction.tracked import Tracked

_EPOCHS_PER_TURNOVER = 32
"""Epochs in which as many blocks come as there are slots."""
_MIN_EPOCH_BLOCKS = 64
"""Shorter epochs would be about single requests."""
_TICKS_PER_INSERT, _TICKS_PER_HIT = 5, 1
_MAX_AGE = 6 * _EPOCHS_PER_TURNOVER
_GHOSTS_PER_SLOT = 3
"""Names remembered of blocks that have left: without them nothing would be known of ages that few blocks reach."""


class CostPolicy:
    """See `EvictionPolicy`.

    Args:
        num_slots: Of the tier.
    """

    def __init__(self, num_slots: int) -> None:
        epoch_blocks = max(_MIN_EPOCH_BLOCKS, num_slots // _EPOCHS_PER_TURNOVER)
        self._epoch_ticks = epoch_blocks * _TICKS_PER_INSERT
        self._ticks = 0
        self._lru = LruPolicy()
        self._cohorts = Cohorts(_MAX_AGE, _GHOSTS_PER_SLOT * num_slots, prior=epoch_blocks)
        self._leaves = LeafQueue()
        self._tracked: dict[SequenceHash, Tracked] = {}
        self._prospect = Prospect()

    def __len__(self) -> int:
        """See `EvictionPolicy`."""
        return len(self._lru)

    def insert(self, block: SequenceHash, facts: BlockFacts) -> None:
        """See `EvictionPolicy`."""
        self._lru.insert(block, facts)
        tracked = self._tracked.get(block)
        if tracked is None:
            tracked = self._tracked[block] = Tracked(block, cost_step(facts.recompute_s))
        else:
            self._prospect.note_missed()
            self._cohorts.leave(tracked)
            tracked.is_resident = True
        parent = None if facts.parent is None else self._tracked.get(facts.parent)
        if parent is not None:
            if parent.is_leaf:
                self._leaves.discard(parent.name, self._cohorts.group(parent))
            parent.num_children += 1
            tracked.parent = parent
        self._enter(tracked, _TICKS_PER_INSERT)

    def hit(self, block: SequenceHash) -> None:
        """See `EvictionPolicy`."""
        self._lru.hit(block)
        self._prospect.note_found()
        tracked = self._tracked[block]
        if tracked.is_leaf:
            self._leaves.discard(block, self._cohorts.group(tracked))
        self._cohorts.leave(tracked)
        self._enter(tracked, _TICKS_PER_HIT)

    def remove(self, block: SequenceHash) -> None:
        """See `EvictionPolicy`."""
        self._lru.remove(block)
        tracked = self._tracked[block]
        if tracked.is_leaf:
            self._leaves.discard(block, self._cohorts.group(tracked))
        self._cohorts.evict(tracked)
        parent, tracked.parent = tracked.parent, None
        if parent is not None:
            parent.num_children -= 1
            if parent.is_leaf:
                self._leaves.add(parent.name, self._cohorts.group(parent))

    def victim(self, is_held: HeldCheck) -> SequenceHash | None:
        """See `EvictionPolicy`."""
        dispensable = self._leaves.lowest(is_held)
        if self._prospect.is_followed and dispensable is not None:
            return dispensable
        oldest = self._lru.victim(is_held)
        if oldest is not None and dispensable is not None:
            self._prospect.note_victim(self._value(oldest), self._value(dispensable))
        return oldest

    def _value(self, block: SequenceHash) -> float:
        return self._cohorts.group(self._tracked[block]).value

    def _enter(self, tracked: Tracked, num_ticks: int) -> None:
        self._cohorts.enter(tracked)
        if tracked.is_leaf:
            self._leaves.add(tracked.name, self._cohorts.group(tracked))
        self._ticks += num_ticks
        if self._ticks >= self._epoch_ticks:
            self._ticks = 0
            self._end_epoch()

    def _end_epoch(self) -> None:
        for block in self._cohorts.end_epoch():
            del self._tracked[block]
        self._leaves.reorder(self._cohorts.groups())
        self._prospect.end_epoch()
