"""Where blocks are: known from workers' events, expected from decisions, within a memory budget.

The answer is exact: equal to asking every worker for every block. Where the budget does not allow that, chains that no
prompt has matched for longest are forgotten whole. Then workers have more than the index says, never less, those
workers count as truncated, and their later events are taken as far as blocks are still known.

A KV block manager's blocks are here once, under a slot of its own (`index.sharing`), and count for each worker whose
lower tiers it keeps.

Must not know of requests, wire formats or the network.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kelp.core.clock import Clock, SystemClock
from kelp.core.errors import ConfigError
from kelp.core.kv_events import BlocksCleared, BlocksStored, KVEvent
from kelp.core.types import SequenceHash, Tier
from kelp.router.index.base import Matches
from kelp.router.index.chain_store import ChainStore
from kelp.router.index.chains import NUM_TIERS, cell_of, slot_of
from kelp.router.index.predicted import DEFAULT_TTL_S, Predictions
from kelp.router.index.reach import KNOWN, Depths, depths_of
from kelp.router.index.slot_sets import SlotSets

DEFAULT_MAX_BYTES = 1 << 30
MIN_BYTES = 1 << 16
"""Less holds no prompt worth naming."""

# What CPython 3.10-3.12 takes, checked against tracemalloc in the tests.
_BLOCK_BYTES = 76
_CHAIN_BYTES = 560
_CELL_BYTES = 260
_LEVEL_BYTES = 150
_TABLE_SLOT_BYTES = 20
_MOST_BLOCK_BYTES = _BLOCK_BYTES + 6 * _TABLE_SLOT_BYTES
_MOST_SPAN_BYTES = _CHAIN_BYTES + _CELL_BYTES
_EMPTY_BYTES = 4096

_COMPACTION_BYTES = 1 << 16
_EVERYTHING = -1


class KVIndex:
    """The `OverlapIndex` of one router.

    Args:
        clock: Times expectations.
        max_bytes: Budget for everything, at least `MIN_BYTES`; expectations' timers may take an eighth of it.
        ttl_s: How long an expectation lasts that nothing confirms or contradicts.

    Raises:
        ConfigError: The budget is too small.
    """

    def __init__(
        self, clock: Clock | None = None, max_bytes: int = DEFAULT_MAX_BYTES, ttl_s: float = DEFAULT_TTL_S
    ) -> None:
        if max_bytes < MIN_BYTES:
            raise ConfigError(f"index max_bytes is {max_bytes}: at least {MIN_BYTES} are needed")
        self.num_forgotten_blocks = 0
        self._max_bytes = max_bytes
        self._store = ChainStore()
        self._predictions = Predictions(self._store, clock or SystemClock(), ttl_s, max_bytes // 8)
        self._slot_sets = SlotSets(max_bytes // 64)
        self._truncated: set[int] = set()
        self._num_slots = 0
        self._slack_bytes = 0
        self._cached = (0, 0)

    @property
    def num_blocks(self) -> int:
        """Different blocks."""
        return len(self._store.blocks)

    @property
    def num_predictions_cut_short(self) -> int:
        """Expectations that ended before their time because there were too many."""
        return self._predictions.num_cut_short

    @property
    def num_bytes(self) -> int:
        """See `OverlapIndex`."""
        store = self._store
        num_blocks = len(store.blocks)
        # A dict that is full grows to the next power of two above three times what is in it.
        table_bytes = _TABLE_SLOT_BYTES << (3 * num_blocks).bit_length()
        return (
            _EMPTY_BYTES
            + table_bytes
            + num_blocks * _BLOCK_BYTES
            + store.num_chains * _CHAIN_BYTES
            + store.num_cells * _CELL_BYTES
            + store.num_levels * (_LEVEL_BYTES + self._num_slots // 7)
            + self._slot_sets.num_bytes
            + self._predictions.num_bytes
        )

    def is_truncated(self, slot: int) -> bool:
        """Whether the worker reported more blocks than the budget allowed to keep."""
        return slot in self._truncated

    def apply(self, slot: int, event: KVEvent) -> None:
        """See `OverlapIndex`."""
        if slot >= self._num_slots:
            self._meet(slot)
        if isinstance(event, BlocksStored):
            tier, hashes = event.tier, event.hashes
            spans = self._store.store(cell_of(slot, tier), hashes, event.parent)
            if tier == Tier.DEVICE and self._predictions:
                self._predictions.settle(slot, spans)
            self._slack_bytes -= len(hashes) * _MOST_BLOCK_BYTES + len(spans) * _MOST_SPAN_BYTES
            if self._slack_bytes < 0:
                self._shed()
        elif isinstance(event, BlocksCleared):
            self._empty(slot)
        else:
            cell = cell_of(slot, event.tier)
            for span in self._store.spans_of(cell, event.hashes):
                self._store.release(cell, span)
            if self._predictions and event.tier == Tier.DEVICE:
                self._predictions.retract(slot, event.hashes)
            self._compact()

    def clear(self, slot: int) -> None:
        """See `OverlapIndex`."""
        self._empty(slot)

    def expect(self, slot: int, hashes: Sequence[SequenceHash]) -> None:
        """See `OverlapIndex`."""
        self._meet(slot)
        self._predictions.expire()
        self._predictions.expect(slot, hashes)
        self._shed()

    def retract(self, slot: int, hashes: Sequence[SequenceHash]) -> None:
        """See `OverlapIndex`."""
        self._predictions.retract(slot, hashes)

    def match(self, hashes: Sequence[SequenceHash]) -> Matches:
        """See `OverlapIndex`."""
        self._predictions.expire()
        depths = depths_of(self._store, hashes)
        matches = self._merge(depths) if len(depths) > 1 else self._spread(depths[0])
        cached = self._store.num_levels, self._slot_sets.num_bytes
        if cached != self._cached:
            self._shed()
        return matches

    def share(self, slot: int, holder: int | None) -> None:
        """The lower tiers of a worker are kept by a manager from now on; None: by nobody.

        Args:
            slot: The worker's.
            holder: The manager's: see `index.sharing.shared_slot`.
        """
        self._meet(slot)
        self._store.share(slot, holder)

    def holdings(self, slot: int, tier: Tier) -> Iterator[SequenceHash]:
        """Blocks that a worker is known to hold in exactly this tier, in no particular order."""
        cell = cell_of(slot, tier)
        for chain in self._store.chains_of(cell):
            bits = chain.held[cell]
            for offset in range(bits.bit_length()):
                if bits >> offset & 1:
                    yield chain.hashes[offset]

    def _meet(self, slot: int) -> None:
        if slot >= self._num_slots:
            self._num_slots = slot + 1
            self._slack_bytes = 0

    def _empty(self, slot: int) -> None:
        self._predictions.clear(slot)
        for tier in Tier:
            cell = cell_of(slot, tier)
            for chain in self._store.chains_of(cell):
                self._store.release(cell, (chain, _EVERYTHING))
        self._truncated.discard(slot)
        self._compact()

    def _shed(self) -> None:
        """If the budget is exceeded, forget chains until the rest fits with a margin."""
        num_bytes = self.num_bytes
        self._cached = self._store.num_levels, self._slot_sets.num_bytes
        if num_bytes <= self._max_bytes:
            self._slack_bytes = self._max_bytes - num_bytes - (_MOST_BLOCK_BYTES - _BLOCK_BYTES) * self.num_blocks
            return
        self._slot_sets.clear()
        limit = self._max_bytes - self._max_bytes // 16
        while self.num_bytes > limit and self._store.num_chains:
            chain = self._store.stale_chain()
            self.num_forgotten_blocks += len(chain.hashes)
            self._truncated.update(map(slot_of, chain.held))
            self._predictions.forget(chain)
            self._store.drop(chain)
        self._cached = self._store.num_levels, self._slot_sets.num_bytes
        self._compact()

    def _compact(self) -> None:
        """After much has gone, give back what is kept for more of it."""
        table_bytes = sys.getsizeof(self._store.blocks)
        if table_bytes > _COMPACTION_BYTES and table_bytes > 4 * _TABLE_SLOT_BYTES * self.num_blocks * 3:
            self._store.compact()
            self._slot_sets.clear()

    def _spread(self, depths: Depths) -> Matches:
        """All tiers are one."""
        lone_slots: list[int] = []
        lone_depths: list[int] = []
        crowds: list[tuple[int, npt.NDArray[np.intp]]] = []
        num_workers = 0
        for depth, mask in depths:
            slot = mask.bit_length() - 1
            if mask == 1 << slot:
                lone_slots.append(slot)
                lone_depths.append(depth)
            else:
                crowd = self._slot_sets[mask]
                crowds.append((depth, crowd))
                num_workers += len(crowd)
        slots = np.empty(num_workers + len(lone_slots), np.intp)
        blocks = np.empty((len(slots), NUM_TIERS), np.int32)
        start = 0
        for depth, crowd in crowds:
            end = start + len(crowd)
            slots[start:end] = crowd
            blocks[start:end] = depth
            start = end
        if lone_slots:
            slots[start:] = lone_slots
            blocks[start:].T[:] = lone_depths
        return Matches(slots, blocks, np.zeros(len(slots), np.int32))

    def _merge(self, depths: tuple[Depths, ...]) -> Matches:
        """Views differ."""
        sets = self._slot_sets
        table = np.zeros((len(depths), self._num_slots), np.int32)
        for view, found in enumerate(depths):
            if view and found is depths[view - 1]:
                table[view] = table[view - 1]
                continue
            for depth, mask in found:
                table[view, sets[mask]] = depth
        slots = table[Tier.OBJECT].nonzero()[0]
        table = table[:, slots]
        return Matches(slots, np.ascontiguousarray(table[:NUM_TIERS].T), table[0] - table[KNOWN])
