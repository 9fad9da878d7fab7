"""Slots whose blocks count for others: a KV block manager's, for each worker whose lower tiers it keeps.

What a manager holds is in the index once, under a negative slot, and never a match by itself; who it counts for is
here. Knows nothing of chains.
"""

from __future__ import annotations


def is_shared(slot: int) -> bool:
    """Whether this is a manager's slot."""
    return slot < 0


def shared_slot(number: int) -> int:
    """A manager's slot in the index from its number among managers; its own inverse."""
    return -1 - number


class Sharing:
    """Which worker's lower tiers are kept by whom."""

    def __init__(self) -> None:
        self._holder_of: dict[int, int] = {}
        self._members: dict[int, int] = {}

    def holder_of(self, slot: int) -> int | None:
        """The slot that keeps the lower tiers of a worker."""
        return self._holder_of.get(slot)

    def members_of(self, holder: int) -> int:
        """Workers for which the blocks of `holder` count, as a bit mask."""
        return self._members.get(holder, 0)

    def assign(self, slot: int, holder: int | None) -> None:
        """The lower tiers of a worker are kept there from now on; None: nowhere."""
        before = self._holder_of.pop(slot, None)
        if before is not None:
            left = self._members[before] & ~(1 << slot)
            if left:
                self._members[before] = left
            else:
                del self._members[before]
        if holder is not None:
            self._holder_of[slot] = holder
            self._members[holder] = self.members_of(holder) | 1 << slot
