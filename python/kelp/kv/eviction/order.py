"""Parts that policies share: an order by keys, and a place for blocks that were held when their turn came.

Held blocks (leased, pinned, or of another tenant than the one that must make room) are often the oldest. Looking at all
of them for every victim would be quadratic, giving them another place would lose their order: they are set aside with
their place, and looked at again a few at a time.

Knows nothing of what makes a block valuable.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import islice

from kelp.core.types import SequenceHash
from kelp.kv.eviction.base import HeldCheck

Key = tuple[float, int, int]
"""The lowest leaves first."""

_SECOND_LOOKS = 8
"""Blocks set aside that each search looks at again: what was let go is found after an eighth as many victims."""
_MIN_HEAP = 64
"""Heaps below this are not worth rebuilding."""


class SetAside:
    """Blocks found held, in the order in which they were found."""

    def __init__(self) -> None:
        self._blocks: dict[SequenceHash, None] = {}

    def __contains__(self, block: SequenceHash) -> bool:
        """Whether it was set aside."""
        return block in self._blocks

    def add(self, block: SequenceHash) -> None:
        """It was held when its turn came."""
        self._blocks[block] = None

    def discard(self, block: SequenceHash) -> None:
        """It got another place, or left."""
        self._blocks.pop(block, None)

    def freed(self, is_held: HeldCheck, is_all: bool) -> list[SequenceHash]:
        """Look again at a few, or at all: takes out and returns those that are no longer held."""
        looked_at = list(self._blocks) if is_all else list(islice(self._blocks, _SECOND_LOOKS))
        found = []
        for block in looked_at:
            del self._blocks[block]
            if is_held(block):
                self._blocks[block] = None
            else:
                found.append(block)
        return found


def search(
    aside: SetAside,
    is_held: HeldCheck,
    first: Callable[[], SequenceHash | None],
    put_back: Callable[[SequenceHash], None],
    take_out: Callable[[SequenceHash], None],
) -> SequenceHash | None:
    """The first block of an order that is not held; those in front of it are set aside. None if all are held.

    Args:
        aside: Belongs to the order.
        is_held: See `EvictionPolicy.victim`.
        first: Lowest block of the order that is not set aside, which stays where it is.
        put_back: Give a block its place in the order again; told the last set aside first.
        take_out: Take the block that `first` named out of the order.
    """
    for freed in reversed(aside.freed(is_held, is_all=False)):
        put_back(freed)
    is_second_round = False
    while True:
        block = first()
        if block is None:
            if is_second_round:
                return None
            is_second_round = True
            for freed in reversed(aside.freed(is_held, is_all=True)):
                put_back(freed)
        elif is_held(block):
            take_out(block)
            aside.add(block)
        else:
            return block


class KeyedOrder:
    """Blocks by key: O(log n) per change, by a heap whose outdated entries are dropped when they come up."""

    def __init__(self) -> None:
        self._keys: dict[SequenceHash, Key] = {}
        self._heap: list[tuple[Key, SequenceHash]] = []
        self._aside = SetAside()

    def __len__(self) -> int:
        """Blocks in the order."""
        return len(self._keys)

    def place(self, block: SequenceHash, key: Key) -> None:
        """Give a block its place, or another one."""
        self._keys[block] = key
        self._aside.discard(block)
        heappush(self._heap, (key, block))
        if len(self._heap) > 2 * len(self._keys) + _MIN_HEAP:
            self._heap = [(key, block) for block, key in self._keys.items() if block not in self._aside]
            heapify(self._heap)

    def remove(self, block: SequenceHash) -> None:
        """The block is no longer there."""
        del self._keys[block]
        self._aside.discard(block)

    def key(self, block: SequenceHash) -> Key:
        """A block's key."""
        return self._keys[block]

    def lowest(self, is_held: HeldCheck) -> SequenceHash | None:
        """The first block that is not held; None if all are."""
        return search(self._aside, is_held, self._first, self._put_back, self._take_out)

    def _first(self) -> SequenceHash | None:
        while self._heap:
            key, block = self._heap[0]
            if self._keys.get(block) == key and block not in self._aside:
                return block
            heappop(self._heap)
        return None

    def _put_back(self, block: SequenceHash) -> None:
        heappush(self._heap, (self._keys[block], block))

    def _take_out(self, _block: SequenceHash) -> None:
        heappop(self._heap)
