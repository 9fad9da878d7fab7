"""A day of workers that come, fill up, evict and go, on a virtual clock: the index's memory against its budget."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from kelp.core.clock import FakeClock
from kelp.core.kv_events import BlocksRemoved, BlocksStored
from kelp.core.types import SequenceHash
from kelp.router.index.kv_index import KVIndex
from perf.rows import Comparison, Measurement, RequiredRow
from perf.stats import Ratio

DAY_S = 86_400.0
BUDGET_BYTES = 8 << 20
_CASE = "index_churn"
REQUIRED = (
    RequiredRow(_CASE, "bytes/budget", "bytes"),
    RequiredRow(_CASE, "bytes_left", "bytes"),
    RequiredRow(_CASE, "blocks_forgotten", "blocks"),
)
_NUM_WORKERS = 64
_NUM_PUBLISHING = 58
_WORKER_BLOCKS = 4096
_STEP_S = 4.0
_STAY_S = 3600.0
_MIN_PROMPT_BLOCKS = 16
_MAX_PROMPT_BLOCKS = 96
_HASH_BYTES = 16
_SEED = 20261121


class ChurnResult(NamedTuple):
    """What a day took.

    Attributes:
        peak_bytes: The most that was ever held, by the allocator or by the index's own word, whichever is more; the
            few bytes that the workers' side of the simulation takes count as the index's.
        left_bytes: What the allocator says is left when all workers have gone.
        num_forgotten_blocks: Blocks given up for the budget: zero would mean that it was never tried.
    """

    peak_bytes: int
    left_bytes: int
    num_forgotten_blocks: int


class _Worker:
    """What one worker holds, oldest first, as numbers of blocks `first .. first + count`; evicts when it is full."""

    def __init__(self) -> None:
        self._held: deque[int] = deque()
        self._num_blocks = 0

    def compute(self, first: int, count: int) -> tuple[SequenceHash, ...]:
        """Keep a prompt; returns the blocks evicted for it."""
        self._held.append(first << 8 | count)
        self._num_blocks += count
        evicted: tuple[SequenceHash, ...] = ()
        while self._num_blocks > _WORKER_BLOCKS:
            oldest = self._held.popleft()
            self._num_blocks -= oldest & 255
            evicted += _names(oldest >> 8, oldest & 255)[::-1]
        return evicted


def _names(first: int, count: int) -> tuple[SequenceHash, ...]:
    return tuple(SequenceHash(block.to_bytes(_HASH_BYTES, "little")) for block in range(first, first + count))


def _steps(index: KVIndex, clock: FakeClock, day_s: float) -> Iterator[None]:
    """One prompt after the other is routed to some worker, which may be a new one; in the end all workers go."""
    dice = random.Random(_SEED)
    workers: dict[int, _Worker] = {}
    first = 0
    for _ in range(int(day_s / _STEP_S)):
        clock.advance(_STEP_S)
        slot = dice.randrange(_NUM_WORKERS)
        if slot not in workers or dice.random() < _NUM_WORKERS * _STEP_S / _STAY_S:
            index.clear(slot)
            workers[slot] = _Worker()
        count = dice.randint(_MIN_PROMPT_BLOCKS, _MAX_PROMPT_BLOCKS)
        index.match(_names(first, count))
        index.expect(slot, _names(first, count))
        if slot < _NUM_PUBLISHING:
            evicted = workers[slot].compute(first, count)
            if evicted:
                index.apply(slot, BlocksRemoved(evicted))
            index.apply(slot, BlocksStored(_names(first, count), None))
        first += count
        yield
    for slot in workers:
        index.clear(slot)


def live_through(day_s: float, budget_bytes: int = BUDGET_BYTES) -> ChurnResult:
    """Run a day, or a part of it."""
    clock = FakeClock()
    gc.collect()
    tracemalloc.start()
    try:
        index = KVIndex(clock, budget_bytes)
        peak_bytes = 0
        for _ in _steps(index, clock, day_s):
            peak_bytes = max(peak_bytes, index.num_bytes, tracemalloc.get_traced_memory()[0])
        gc.collect()
        left_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    return ChurnResult(peak_bytes, left_bytes, index.num_forgotten_blocks)


def rows() -> Iterator[Measurement]:
    """The day's rows; what is left may be a hundredth of the budget."""
    result = live_through(DAY_S)
    for metric, held_bytes, limit_bytes in (
        ("bytes/budget", result.peak_bytes, BUDGET_BYTES),
        ("bytes_left", result.left_bytes, BUDGET_BYTES // 100),
    ):
        ratio = limit_bytes / held_bytes
        comparison = Comparison("limit", limit_bytes, Ratio(ratio, ratio, ratio), 1.0)
        yield Measurement(_CASE, metric, "bytes", held_bytes, comparison)
    trouble = "" if result.num_forgotten_blocks else "the budget was never reached"
    yield Measurement(_CASE, "blocks_forgotten", "blocks", result.num_forgotten_blocks, trouble=trouble)
