"""Sealed blocks that nobody holds, in the order in which they are evicted, and which blocks are pinned.

A pin is for who reads a block without being its user: unlike a reference it leaves the order as it is. A firm one keeps
the block until it is taken back. Any other asks for the block to be evicted after everything else, and goes with it.

Looking for a victim passes over pinned blocks only, of which there are few whatever the size of the pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice

from kelp.core.types import BlockId


class CachedBlocks:
    """See the module docstring; the least recently released block goes first."""

    def __init__(self) -> None:
        self._order: OrderedDict[BlockId, None] = OrderedDict()
        # Of held blocks, too; whether each is firm.
        self._pins: dict[BlockId, bool] = {}
        self._num_pinned = 0
        self._num_firm = 0

    def __len__(self) -> int:
        """Blocks that nobody holds."""
        return len(self._order)

    def __contains__(self, block_id: BlockId) -> bool:
        """Whether nobody holds this sealed block."""
        return block_id in self._order

    def __iter__(self) -> Iterator[BlockId]:
        """As they would be evicted, pins left aside."""
        return iter(self._order)

    @property
    def num_available(self) -> int:
        """Blocks that `take` can give."""
        return len(self._order) - self._num_firm

    @property
    def pinned(self) -> set[BlockId]:
        """Held ones included."""
        return set(self._pins)

    @property
    def num_pins(self) -> int:
        """Held blocks' included."""
        return len(self._pins)

    def is_pinned(self, block_id: BlockId) -> bool:
        """Whether the block is pinned, firmly or not."""
        return block_id in self._pins

    def add(self, block_id: BlockId) -> None:
        """The block has lost its last reference."""
        self._order[block_id] = None
        self._count(block_id, 1)

    def remove(self, block_id: BlockId) -> None:
        """The block is held again; a pin stays."""
        del self._order[block_id]
        self._count(block_id, -1)

    def pin(self, block_id: BlockId, is_firm: bool) -> None:
        """Pin a block that is not."""
        assert block_id not in self._pins
        self._pins[block_id] = is_firm
        if block_id in self._order:
            self._count(block_id, 1)

    def unpin(self, block_id: BlockId) -> None:
        """Take the pin of a block back."""
        if block_id in self._order:
            self._count(block_id, -1)
        del self._pins[block_id]

    def loosen(self) -> None:
        """No pin is firm any more."""
        self._pins = dict.fromkeys(self._pins, False)
        self._num_firm = 0

    def take(self, count: int) -> list[BlockId]:
        """Evict as many as are available at most: unpinned ones first, each kind in order."""
        if not self._num_pinned:
            return [self._order.popitem(last=False)[0] for _ in range(count)]
        taken = list(islice((block_id for block_id in self._order if block_id not in self._pins), count))
        if len(taken) < count:
            loose = (block_id for block_id in self._order if self._pins.get(block_id) is False)
            taken += islice(loose, count - len(taken))
        for block_id in taken:
            self.remove(block_id)
            self._pins.pop(block_id, None)
        return taken

    def is_sound(self) -> bool:
        """Whether the counts are those of the blocks."""
        kinds = [self._pins[block_id] for block_id in self._order if block_id in self._pins]
        return (self._num_pinned, self._num_firm) == (len(kinds), sum(kinds))

    def _count(self, block_id: BlockId, change: int) -> None:
        is_firm = self._pins.get(block_id)
        if is_firm is not None:
            self._num_pinned += change
            self._num_firm += change * is_firm
