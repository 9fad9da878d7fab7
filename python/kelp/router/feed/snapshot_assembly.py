"""Collects the parts of a snapshot, which counts only whole."""

from __future__ import annotations

from collections.abc import Sequence

from kelp.core.kv_events import BlocksCleared, KVEvent
from kelp.kv.events.codec import SnapshotExtension

_MAX_BLOCKS = 1 << 24


class SnapshotAssembly:
    """Parts of one snapshot so far.

    Attributes:
        as_of: Sequence number of the last batch that the snapshot contains.
    """

    def __init__(self) -> None:
        self.as_of = -1
        self._parts: list[Sequence[KVEvent]] = []
        self._num_blocks = 0

    def add(self, as_of: int, part: SnapshotExtension, events: Sequence[KVEvent]) -> bool:
        """Take the next part; False if it does not fit the earlier ones, or is one too many."""
        if part.number != len(self._parts) or (self._parts and as_of != self.as_of):
            return False
        self.as_of = as_of
        self._parts.append(events)
        self._num_blocks += sum(0 if isinstance(event, BlocksCleared) else len(event.hashes) for event in events)
        return self._num_blocks <= _MAX_BLOCKS

    def take(self) -> list[Sequence[KVEvent]]:
        """The parts, which are forgotten here."""
        parts, self._parts, self._num_blocks = self._parts, [], 0
        return parts
