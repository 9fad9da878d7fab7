"""An arena filled with blocks whose records are right, for tiers that are measured by themselves."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kelp.core.config_kv import KvManagerConfig
from kelp.core.hashing import HASH_VERSION, seed_hash, sequence_hashes, tenant_digest
from kelp.core.kv_manager_messages import SpaceRecord
from kelp.core.types import SequenceHash
from kelp.kv.tiers.arena import FileArena, open_arena
from kelp.kv.tiers.base import BlockRecord

TENANT = tenant_digest("")
_BLOCK_SIZE = 16


def gb_per_s(move: Callable[[], None], num_bytes: int) -> float:
    """Of one call."""
    started_s = time.perf_counter()
    move()
    return num_bytes / (time.perf_counter() - started_s) / 1e9


def space_record(block_bytes: int) -> SpaceRecord:
    """Of blocks that nobody looks into."""
    return SpaceRecord(
        num_layers=1,
        num_kv_heads=1,
        block_size=_BLOCK_SIZE,
        head_dim=max(1, block_bytes // (2 * _BLOCK_SIZE * 2)),
        dtype="bfloat16",
        model_id="bench-tiers",
        hash_version=HASH_VERSION,
    )


class FilledArena:
    """`num_blocks` slots with random bytes, each the block at its position of one sequence."""

    def __init__(self, folder: Path, num_blocks: int, block_bytes: int) -> None:
        self.space = space_record(block_bytes)
        self._folder = folder
        config = KvManagerConfig(arena_folder=folder, host_bytes=num_blocks * block_bytes)
        self.arena: FileArena = open_arena(config, self.space, block_bytes)
        random = np.random.default_rng(3)
        for slot in range(num_blocks):
            self.arena.view(slot)[:] = random.integers(0, 256, block_bytes, dtype=np.uint8).data
        self.num_blocks = num_blocks

    def records(self, seed: int) -> list[BlockRecord]:
        """What lies in the slots, under names that follow from the seed."""
        tokens = np.random.default_rng(seed).integers(0, 2**31 - 1, self.num_blocks * _BLOCK_SIZE, dtype=np.int32)
        names: list[SequenceHash] = sequence_hashes(tokens, _BLOCK_SIZE, seed_hash("bench-tiers"))
        return [
            BlockRecord(name, names[slot - 1] if slot else None, slot, TENANT, self.arena.checksum(slot, name))
            for slot, name in enumerate(names)
        ]

    def close(self) -> None:
        """Give the memory back."""
        self.arena.close(is_kept=False)
        shutil.rmtree(self._folder, ignore_errors=True)
