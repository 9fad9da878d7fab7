"""What workers are expected to hold because a request was just sent there.

An expectation counts until the worker's own events confirm or contradict it, the request fails, or its time is up. It
is a cell of its own in the chains, so a prompt is followed once for both what is known and what is expected.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from kelp.core.clock import Clock
from kelp.core.types import SequenceHash, Tier
from kelp.router.index.chain_store import ChainStore
from kelp.router.index.chains import EXPECTED, Chain, Span, cell_of, kind_of

DEFAULT_TTL_S = 120.0
"""As Dynamo's."""

_RECORD_BYTES = 520
_TIMER_BYTES = 200
_MIN_DEAD_TIMERS = 64

_Key = tuple[Chain, int]


class Predictions:
    """Expectations of all workers, with the time each ends.

    Attributes:
        num_cut_short: Expectations that ended early because there were too many.

    Args:
        store: Where the blocks are.
        clock: Times them.
        ttl_s: How long an expectation lasts.
        max_bytes: The oldest end early beyond this.
    """

    def __init__(self, store: ChainStore, clock: Clock, ttl_s: float, max_bytes: int) -> None:
        self.num_cut_short = 0
        self._store = store
        self._clock = clock
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._records: dict[_Key, list[tuple[float, int]]] = {}
        self._timers: list[tuple[float, int, _Key]] = []
        self._order = itertools.count()

    def __bool__(self) -> bool:
        """Whether anything is expected."""
        return bool(self._records)

    @property
    def num_bytes(self) -> int:
        """Estimated memory beyond what is in the chains."""
        return len(self._records) * _RECORD_BYTES + len(self._timers) * _TIMER_BYTES

    def expect(self, slot: int, hashes: Sequence[SequenceHash]) -> None:
        """Count on these blocks, as far as the worker is not known to have them."""
        deadline_s = self._clock.monotonic_s() + self._ttl_s
        cell = cell_of(slot, EXPECTED)
        for chain, bits in self._store.place(cell, hashes, None):
            missing = bits & ~chain.held.get(cell_of(slot, Tier.DEVICE), 0)
            if missing:
                self._add((chain, cell), deadline_s, missing)
        self._prune()
        while self.num_bytes > self._max_bytes and self._timers:
            deadline_s, _, key = self._timers[0]
            self.num_cut_short += key in self._records
            self._ring(deadline_s)

    def _add(self, key: _Key, deadline_s: float, bits: int) -> None:
        records = self._records.get(key)
        if records is None:
            records = self._records[key] = []
            heapq.heappush(self._timers, (deadline_s, next(self._order), key))
        while records and not records[-1][1] & ~bits:
            records.pop()
        records.append((deadline_s, bits))
        chain, cell = key
        self._store.hold(cell, (chain, bits))

    def settle(self, slot: int, spans: Sequence[Span]) -> None:
        """Nothing is expected of these blocks any more: they are known to be there, or not to be."""
        cell = cell_of(slot, EXPECTED)
        for chain, bits in spans:
            if cell in chain.held:
                left = [(deadline_s, kept & ~bits) for deadline_s, kept in self._records[chain, cell]]
                self._keep((chain, cell), [record for record in left if record[1]])
        self._prune()

    def retract(self, slot: int, hashes: Sequence[SequenceHash]) -> None:
        """As `settle`, by name."""
        self.settle(slot, self._store.spans_of(cell_of(slot, EXPECTED), hashes))

    def forget(self, chain: Chain) -> None:
        """A chain is about to be dropped."""
        for cell in chain.held:
            if kind_of(cell) == EXPECTED:
                del self._records[chain, cell]

    def clear(self, slot: int) -> None:
        """Expect nothing of a worker."""
        cell = cell_of(slot, EXPECTED)
        for chain in self._store.chains_of(cell):
            self._keep((chain, cell), [])
        self._prune()

    def expire(self) -> None:
        """End what has been expected for too long."""
        if self._timers:
            now_s = self._clock.monotonic_s()
            while self._timers and self._timers[0][0] <= now_s:
                self._ring(now_s)

    def _ring(self, now_s: float) -> None:
        key = heapq.heappop(self._timers)[2]
        records = self._records.get(key)
        if records is None:
            return
        left = [record for record in records if record[0] > now_s]
        if left:
            heapq.heappush(self._timers, (left[0][0], next(self._order), key))
        self._keep(key, left)

    def _keep(self, key: _Key, records: list[tuple[float, int]]) -> None:
        chain, cell = key
        kept = 0
        for _, bits in records:
            kept |= bits
        if records:
            self._records[key] = records
        else:
            del self._records[key]
        self._store.release(cell, (chain, chain.held[cell] & ~kept))

    def _prune(self) -> None:
        """Most expectations are settled long before their time: drop their timers when they are the greater part."""
        if len(self._timers) > 2 * len(self._records) + _MIN_DEAD_TIMERS:
            self._timers = [(records[0][0], next(self._order), key) for key, records in self._records.items()]
            heapq.heapify(self._timers)
