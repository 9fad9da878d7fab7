"""File systems that are full: a small tmpfs, where the tests may mount one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kelp.core.config_kv import KvManagerConfig
from kelp.core.errors import ConfigError
from kelp.kv.tiers.arena import open_arena
from support.tier_rig import BLOCK_BYTES, SPACE, STRIDE, disk_config, make_arena, open_disk, read, write
from support.tmpfs import mounted_tmpfs

ROOM_BYTES = 4 * 1024 * 1024


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system of `ROOM_BYTES`."""
    with mounted_tmpfs(tmp_path / "small", f"size={ROOM_BYTES}") as folder:
        yield folder


def test_an_arena_that_does_not_fit_is_refused_and_leaves_nothing(full: Path) -> None:
    with pytest.raises(ConfigError, match="kv_manager.host_bytes"):
        open_arena(KvManagerConfig(arena_folder=full / "arena", host_bytes=ROOM_BYTES), SPACE, BLOCK_BYTES)
    assert list(full.iterdir()) == []


def test_an_automatic_arena_takes_what_fits_and_all_of_it_can_be_written(full: Path) -> None:
    config = KvManagerConfig(arena_folder=full / "arena", host_memory_fraction=1.0)
    arena = open_arena(config, SPACE, BLOCK_BYTES)
    assert 0 < arena.num_slots * STRIDE < ROOM_BYTES
    for slot in range(arena.num_slots):
        arena.view(slot)[:] = b"\1" * BLOCK_BYTES
    arena.close(is_kept=False)


def test_a_disk_tier_that_does_not_fit_is_refused_and_leaves_nothing(full: Path, tmp_path: Path) -> None:
    arena = make_arena(tmp_path)
    config = disk_config(full, num_slots=ROOM_BYTES // STRIDE)
    with pytest.raises(ConfigError, match=r"disk_tier.max_bytes: \d+ bytes in .*No space left.*\d+ are free"):
        open_disk(config, arena)
    assert [path for path in full.rglob("*") if path.is_file()] == []
    arena.close(is_kept=False)


def test_a_disk_tier_that_cannot_grow_keeps_its_blocks(full: Path, tmp_path: Path) -> None:
    arena = make_arena(tmp_path)
    config = disk_config(full)
    disk = open_disk(config, arena)
    write(disk, arena, {7: 1})
    disk.close()
    with pytest.raises(ConfigError, match="disk_tier.max_bytes"):
        open_disk(config.model_copy(update={"max_bytes": 2 * ROOM_BYTES}), arena)
    again = open_disk(config, arena)
    assert [slot for slot, _ in again.recovered()] == [7]
    assert read(again, arena, 7, 1)
    again.close()
    arena.close(is_kept=False)


def test_a_disk_that_fills_up_behind_the_tier_loses_nothing_that_was_preallocated(full: Path, tmp_path: Path) -> None:
    arena = make_arena(tmp_path)
    disk = open_disk(disk_config(full), arena)
    write(disk, arena, {0: 1})
    (full / "others").write_bytes(bytes(free_bytes(full)))
    assert write(disk, arena, {1: 2}) == [True]
    assert read(disk, arena, 0, 1) and read(disk, arena, 1, 2)
    disk.close()
    arena.close(is_kept=False)


def test_a_slot_whose_space_others_took_is_not_written(full: Path, tmp_path: Path) -> None:
    arena = make_arena(tmp_path)
    disk = open_disk(disk_config(full), arena)
    write(disk, arena, {0: 1, 1: 2})
    os.truncate(disk._folder.path / "blocks", 0)
    os.truncate(disk._folder.path / "blocks", 8 * STRIDE)
    (full / "others").write_bytes(bytes(free_bytes(full)))
    assert write(disk, arena, {0: 3, 1: 4}) == [False, False]
    assert disk.counts.num_failed == 2
    assert not read(disk, arena, 0, 3)
    (full / "others").unlink()
    assert write(disk, arena, {0: 3}) == [True]
    assert read(disk, arena, 0, 3)
    disk.close()
    arena.close(is_kept=False)


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
