"""Small arenas and disk tiers for tests, and blocks whose bytes follow from their number."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from kelp.core.config_kv import DiskTierConfig, KvManagerConfig
from kelp.core.hashing import tenant_digest
from kelp.core.kv_manager_messages import SpaceRecord
from kelp.core.types import SequenceHash
from kelp.kv.tiers.arena import FileArena, open_arena
from kelp.kv.tiers.base import BlockRecord
from kelp.kv.tiers.disk import FileDiskTier, open_disk_tier
from kelp.kv.tiers.keys import open_sealer
from kelp.kv.tiers.records import RECORD_BYTES, checksum

SPACE = SpaceRecord(
    num_layers=2, num_kv_heads=2, block_size=16, head_dim=8, dtype="bfloat16", model_id="m", hash_version=1
)
BLOCK_BYTES = 5000
STRIDE = 8192


def name(number: int) -> SequenceHash:
    return SequenceHash(hashlib.blake2b(b"block %d" % number, digest_size=16).digest())


def content(number: int, num_bytes: int = BLOCK_BYTES) -> bytes:
    return np.random.default_rng(number).integers(0, 256, num_bytes, dtype=np.uint8).tobytes()


def block(number: int, salt: str = "") -> BlockRecord:
    parent = name(number - 1) if number else None
    return BlockRecord(name(number), parent, number, tenant_digest(salt), checksum(content(number), name(number)))


def make_arena(folder: Path, num_slots: int = 8, space: SpaceRecord = SPACE) -> FileArena:
    config = KvManagerConfig(arena_folder=folder / "arena", host_bytes=num_slots * STRIDE)
    return open_arena(config, space, BLOCK_BYTES)


def fill(arena: FileArena, slot: int, number: int) -> None:
    arena.view(slot)[:] = content(number)


def disk_config(folder: Path, num_slots: int = 8, **fields: object) -> DiskTierConfig:
    max_bytes = num_slots * (STRIDE + RECORD_BYTES)
    return DiskTierConfig.model_validate({"path": folder / "disk", "max_bytes": max_bytes, **fields})


def open_disk(config: DiskTierConfig, arena: FileArena, space: SpaceRecord = SPACE) -> FileDiskTier:
    return open_disk_tier(config, space, arena, open_sealer(config, space, BLOCK_BYTES))


def write(tier: FileDiskTier, arena: FileArena, numbers: dict[int, int]) -> list[bool]:
    """Write blocks `{disk slot: number}` by way of the first arena slots."""
    moves = []
    for arena_slot, (disk_slot, number) in enumerate(numbers.items()):
        fill(arena, arena_slot, number)
        moves.append((arena_slot, disk_slot, block(number)))
    return tier.write(moves)


def read(tier: FileDiskTier, arena: FileArena, disk_slot: int, number: int, arena_slot: int = 0) -> bool:
    """Whether a block was read; its bytes are compared, too."""
    arena.view(arena_slot)[:] = bytes(BLOCK_BYTES)
    (is_right,) = tier.read([(disk_slot, arena_slot, block(number))])
    assert not is_right or bytes(arena.view(arena_slot)) == content(number), "wrong bytes were called right"
    return is_right


def data_file(config: DiskTierConfig, file: str = "blocks") -> Path:
    assert config.path is not None
    (folder,) = config.path.iterdir()
    return folder / file


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))
