"""Which leaf goes first: blocks that no resident block follows, in groups that are worth the same.

Other blocks are no candidates: without them their children would be of no use.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush

from kelp.core.types import SequenceHash
from kelp.kv.eviction.base import HeldCheck
from kelp.kv.eviction.order import SetAside, search


class LeafGroup:
    """Leaves that are worth the same; the one that joined last leaves first, so that the rest of a prefix stays whole.

    Attributes:
        value: Orders groups; the lowest loses its leaves first.
        cost: Of computing one of its blocks, rounded.
    """

    __slots__ = ("cost", "is_queued", "leaves", "value")

    def __init__(self, cost: float, value: float) -> None:
        self.leaves: dict[SequenceHash, None] = {}
        self.cost = cost
        self.value = value
        self.is_queued = False


class LeafQueue:
    """Leaves by their groups' value."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, LeafGroup]] = []
        self._num_queued = 0
        self._aside = SetAside()
        self._groups_aside: dict[SequenceHash, LeafGroup] = {}

    def add(self, name: SequenceHash, group: LeafGroup) -> None:
        """A block became a leaf, or a leaf changed its cohort."""
        group.leaves[name] = None
        if not group.is_queued:
            group.is_queued = True
            self._num_queued += 1
            heappush(self._heap, (group.value, self._num_queued, group))

    def discard(self, name: SequenceHash, group: LeafGroup) -> None:
        """It is a leaf of that group no longer."""
        group.leaves.pop(name, None)
        if self._groups_aside.pop(name, None) is not None:
            self._aside.discard(name)

    def reorder(self, groups: Iterable[LeafGroup]) -> None:
        """Values have changed; `groups` are all there are, in order of age."""
        self._heap = []
        for group in groups:
            group.is_queued = bool(group.leaves)
            if group.is_queued:
                self._num_queued += 1
                self._heap.append((group.value, self._num_queued, group))
        heapify(self._heap)

    def lowest(self, is_held: HeldCheck) -> SequenceHash | None:
        """The leaf to go first that is not held; None if all are."""
        return search(self._aside, is_held, self._first, self._put_back, self._take_out)

    def _first(self) -> SequenceHash | None:
        while self._heap:
            group = self._heap[0][2]
            if group.leaves:
                return next(reversed(group.leaves))
            group.is_queued = False
            heappop(self._heap)
        return None

    def _put_back(self, name: SequenceHash) -> None:
        self.add(name, self._groups_aside.pop(name))

    def _take_out(self, name: SequenceHash) -> None:
        group = self._heap[0][2]
        del group.leaves[name]
        self._groups_aside[name] = group
