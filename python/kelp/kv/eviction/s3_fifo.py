"""S3-FIFO: a small queue that new blocks must outlive, a main queue, and a memory of names that came back too late.

Yang et al., "FIFO queues are all you need for cache eviction", SOSP'23, Algorithm 1: a block enters the small queue,
or the main one if its name is among the ghosts; from the small queue it moves to the main one if it was used more than
once since, else it leaves and its name becomes a ghost; in the main queue a used block gets another round for each use
counted (up to 3). Amortised O(1).
"""

from __future__ import annotations

from collections import OrderedDict

from kelp.core.types import SequenceHash
from kelp.kv.eviction.base import BlockFacts, HeldCheck
from kelp.kv.eviction.order import SetAside, search

_SMALL_SHARE = 0.1
"""Of the tier, for the small queue: the paper's choice (section 4.1)."""
_MAX_COUNT = 3
"""Uses that count: two bits per block in the paper."""
_MOVE_COUNT = 2
"""Uses that make a block of the small queue move on: the paper's `freq > 1`."""

_Queue = OrderedDict[SequenceHash, None]


class S3FifoPolicy:
    """See `EvictionPolicy`.

    Args:
        num_slots: Of the tier; as many names are remembered as the main queue has room for.
    """

    def __init__(self, num_slots: int) -> None:
        self._small_slots = max(1, round(num_slots * _SMALL_SHARE))
        self._max_ghosts = max(1, num_slots - self._small_slots)
        self._small: _Queue = OrderedDict()
        self._main: _Queue = OrderedDict()
        self._ghosts: _Queue = OrderedDict()
        self._counts: dict[SequenceHash, int] = {}
        self._aside = SetAside()
        self._held_small: set[SequenceHash] = set()

    def __len__(self) -> int:
        """See `EvictionPolicy`."""
        return len(self._counts)

    def insert(self, block: SequenceHash, facts: BlockFacts) -> None:
        """See `EvictionPolicy`; facts play no part here."""
        self._counts[block] = 0
        if block in self._ghosts:
            del self._ghosts[block]
            self._main[block] = None
        else:
            self._small[block] = None

    def hit(self, block: SequenceHash) -> None:
        """See `EvictionPolicy`."""
        self._counts[block] = min(_MAX_COUNT, self._counts[block] + 1)

    def remove(self, block: SequenceHash) -> None:
        """See `EvictionPolicy`."""
        del self._counts[block]
        self._aside.discard(block)
        if block in self._small or block in self._held_small:
            self._small.pop(block, None)
            self._held_small.discard(block)
            self._ghosts[block] = None
            if len(self._ghosts) > self._max_ghosts:
                self._ghosts.popitem(last=False)
        else:
            self._main.pop(block, None)

    def victim(self, is_held: HeldCheck) -> SequenceHash | None:
        """See `EvictionPolicy`."""
        return search(self._aside, is_held, self._first, self._put_back, self._take_out)

    def _first(self) -> SequenceHash | None:
        while self._small or self._main:
            is_small_full = len(self._small) + len(self._held_small) >= self._small_slots
            if self._small and (is_small_full or not self._main):
                block = next(iter(self._small))
                if self._counts[block] < _MOVE_COUNT:
                    return block
                del self._small[block]
                self._main[block] = None
                self._counts[block] = 0
            else:
                block = next(iter(self._main))
                if not self._counts[block]:
                    return block
                self._counts[block] -= 1
                self._main.move_to_end(block)
        return None

    def _put_back(self, block: SequenceHash) -> None:
        """To the front of its queue: it was there, and nothing in front of it has stayed."""
        queue = self._small if block in self._held_small else self._main
        self._held_small.discard(block)
        queue[block] = None
        queue.move_to_end(block, last=False)

    def _take_out(self, block: SequenceHash) -> None:
        if block in self._small:
            del self._small[block]
            self._held_small.add(block)
        else:
            del self._main[block]
