"""Which blocks were used together: what keeps the order by recency from tearing prefixes apart."""

from __future__ import annotations

from kelp.core.types import SequenceHash


class Runs:
    """Numbers the runs of blocks that were used together: each block the parent's successor, one after the other."""

    def __init__(self) -> None:
        self._run = 0
        self._last: SequenceHash | None = None

    def touch(self, block: SequenceHash, parent: SequenceHash | None) -> int:
        """The run that a use of `block` belongs to."""
        if parent is None or parent != self._last:
            self._run += 1
        self._last = block
        return self._run
