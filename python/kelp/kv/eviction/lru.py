"""Least recently used, tails first: what a request used together leaves from its last block on.

A block without its parent is of no use, so of blocks used at the same time the deepest goes first (as `kv.pool` does,
and vLLM's prefix cache: its free queue takes a request's blocks in reverse). No constants.
"""

from __future__ import annotations

from kelp.core.types import SequenceHash
from kelp.kv.eviction.base import BlockFacts, HeldCheck
from kelp.kv.eviction.order import KeyedOrder
from kelp.kv.eviction.runs import Runs


class LruPolicy:
    """See `EvictionPolicy`; O(log n)."""

    def __init__(self) -> None:
        self._order = KeyedOrder()
        self._runs = Runs()
        self._facts: dict[SequenceHash, BlockFacts] = {}

    def __len__(self) -> int:
        """See `EvictionPolicy`."""
        return len(self._order)

    def insert(self, block: SequenceHash, facts: BlockFacts) -> None:
        """See `EvictionPolicy`."""
        self._facts[block] = facts
        self.hit(block)

    def hit(self, block: SequenceHash) -> None:
        """See `EvictionPolicy`."""
        facts = self._facts[block]
        self._order.place(block, (0.0, self._runs.touch(block, facts.parent), -facts.position))

    def remove(self, block: SequenceHash) -> None:
        """See `EvictionPolicy`."""
        del self._facts[block]
        self._order.remove(block)

    def victim(self, is_held: HeldCheck) -> SequenceHash | None:
        """See `EvictionPolicy`."""
        return self._order.lowest(is_held)
