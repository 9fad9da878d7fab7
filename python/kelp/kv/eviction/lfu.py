"""Least frequently used with ageing: a block's priority is how often it was used, above the floor at its last use.

The floor rises to the priority of whatever leaves, so that former favourites lose to what is in use now: LFU with
dynamic ageing (Arlitt, Cherkasova et al., "Evaluating content management techniques for web proxy caches", 2000), which
is GreedyDual-Size-Frequency (Cherkasova, 1998) with equal sizes and costs. Equal priorities leave as in `lru`: least
recently used, tails first. No constants.
"""

from __future__ import annotations

from kelp.core.types import SequenceHash
from kelp.kv.eviction.base import BlockFacts, HeldCheck
from kelp.kv.eviction.order import KeyedOrder
from kelp.kv.eviction.runs import Runs


class LfuPolicy:
    """See `EvictionPolicy`; O(log n)."""

    def __init__(self) -> None:
        self._order = KeyedOrder()
        self._runs = Runs()
        self._floor = 0.0
        self._facts: dict[SequenceHash, BlockFacts] = {}
        self._num_uses: dict[SequenceHash, int] = {}

    def __len__(self) -> int:
        """See `EvictionPolicy`."""
        return len(self._order)

    def insert(self, block: SequenceHash, facts: BlockFacts) -> None:
        """See `EvictionPolicy`."""
        self._facts[block] = facts
        self._num_uses[block] = 0
        self.hit(block)

    def hit(self, block: SequenceHash) -> None:
        """See `EvictionPolicy`."""
        facts = self._facts[block]
        self._num_uses[block] += 1
        run = self._runs.touch(block, facts.parent)
        self._order.place(block, (self._floor + self._num_uses[block], run, -facts.position))

    def remove(self, block: SequenceHash) -> None:
        """See `EvictionPolicy`."""
        del self._facts[block], self._num_uses[block]
        self._order.remove(block)

    def victim(self, is_held: HeldCheck) -> SequenceHash | None:
        """See `EvictionPolicy`."""
        block = self._order.lowest(is_held)
        if block is not None:
            self._floor = max(self._floor, self._order.key(block)[0])
        return block
