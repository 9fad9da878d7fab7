"""The disk tier against plain O_DIRECT calls of eight threads on the same file.

Two references read the same blocks: `odirect`, as the tier has to, into the arena's slots, and `odirect_elsewhere` into
as much anonymous memory. Whoever reads a block a second time may find it in a cache of the machine that this one runs
on, so everything has been read once before the first sample, and who begins rotates.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kelp.core.config_kv import DiskTierConfig
from kelp.core.errors import KelpError
from kelp.kv.tiers.disk import FileDiskTier, open_disk_tier
from kelp.transport.files import memory_view
from perf.kv.blocks import FilledArena, gb_per_s
from perf.kv.tier_messages import TierRates, TierSpec
from perf.suite import BenchError

TIER, SAME_MEMORY, OTHER_MEMORY = "tier", "odirect", "odirect_elsewhere"
NUM_THREADS = 8

_RECORD_ROOM = 8192
_Call = Callable[[int, list[memoryview], int], int]


class DiskContest:
    """Made with the tier open; `close` it.

    Raises:
        BenchError: The tier does not open, or its file system has no O_DIRECT.
    """

    def __init__(self, spec: TierSpec, work: Path, arena_folder: Path) -> None:
        self._spec = spec
        self._num_bytes = spec.num_blocks * spec.block_bytes
        self._filled = FilledArena(arena_folder, spec.num_blocks, spec.block_bytes)
        path = work / "disk"
        config = DiskTierConfig(path=path, max_bytes=2 * spec.num_blocks * (spec.block_bytes + _RECORD_ROOM))
        try:
            self._tier: FileDiskTier = open_disk_tier(config, self._filled.space, self._filled.arena, None)
        except KelpError as error:
            self._filled.close()
            raise BenchError(f"disk tier: {error}") from None
        self._records = self._filled.records(seed=11)
        (file,) = (file for file in path.glob("*/blocks"))
        try:
            self._fd = os.open(file, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            raise BenchError(f"{file}: O_DIRECT: {error.strerror}") from None
        self._other = mmap.mmap(-1, self._num_bytes)
        np.frombuffer(self._other, np.uint8)[:] = 1
        self._threads = ThreadPoolExecutor(NUM_THREADS)

    def run(self, rates: TierRates) -> None:
        """Write and read in turn.

        Raises:
            BenchError: The tier did not do all.
        """
        contestants = {
            ("g3_write", TIER): self._write,
            ("g3_write", SAME_MEMORY): lambda: self._plain(os.pwritev, self._arena_slot, self._spec.num_blocks),
            ("g3_read", TIER): self._read,
            ("g3_read", SAME_MEMORY): lambda: self._plain(os.preadv, self._arena_slot, 0),
            ("g3_read", OTHER_MEMORY): lambda: self._plain(os.preadv, self._other_slot, 0),
        }
        order = list(contestants)
        for number in range(self._spec.num_rounds + 1):
            for case, contestant in order[number % len(order) :] + order[: number % len(order)] if number else order:
                rate = gb_per_s(contestants[case, contestant], self._num_bytes)
                if number:
                    rates.add(case, contestant, rate)

    def close(self) -> None:
        """Give everything back."""
        self._threads.shutdown()
        os.close(self._fd)
        self._tier.close()
        self._filled.close()

    def _write(self) -> None:
        moves = [(slot, slot, record) for slot, record in enumerate(self._records)]
        _require(self._tier.write(moves), "written")

    def _read(self) -> None:
        moves = [(slot, slot, record) for slot, record in enumerate(self._records)]
        _require(self._tier.read(moves), "read")

    def _arena_slot(self, slot: int) -> memoryview:
        region = self._filled.arena.region
        return memory_view(region.base_address + slot * region.stride, region.stride)

    def _other_slot(self, slot: int) -> memoryview:
        size = self._spec.block_bytes
        return memoryview(self._other)[slot * size : (slot + 1) * size]

    def _plain(self, call: _Call, memory: Callable[[int], memoryview], first_file_slot: int) -> None:
        size = self._spec.block_bytes

        def move(slot: int) -> int:
            return call(self._fd, [memory(slot)], (first_file_slot + slot) * size)

        moved = sum(self._threads.map(move, range(self._spec.num_blocks)))
        if moved != self._num_bytes:
            raise BenchError(f"disk: {moved} of {self._num_bytes} bytes were moved")


def _require(results: list[bool], what: str) -> None:
    if not all(results):
        raise BenchError(f"disk tier: {results.count(False)} of {len(results)} blocks were not {what}")
