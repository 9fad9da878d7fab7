from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kelp.core.config_kv import KvManagerConfig
from kelp.core.errors import ConfigError
from kelp.kv.tiers import arena as arena_module
from kelp.kv.tiers.arena import open_arena
from kelp.kv.tiers.arena_file import ArenaFile
from support.tier_rig import BLOCK_BYTES, SPACE, STRIDE, block, content, fill, flip, make_arena, name

OTHER = msgspec.structs.replace(SPACE, model_id="other")


def test_slots_are_aligned_equal_and_where_the_region_says(tmp_path: Path) -> None:
    arena = make_arena(tmp_path, num_slots=3)
    region = arena.region
    assert (arena.num_slots, region.num_blocks, region.block_bytes, region.stride) == (3, 3, BLOCK_BYTES, STRIDE)
    assert region.base_address % 4096 == 0
    fill(arena, 2, 7)
    owner = arena.owner
    assert isinstance(owner, np.ndarray)
    start = region.base_address - owner.ctypes.data + 2 * STRIDE
    assert owner[start : start + BLOCK_BYTES].tobytes() == content(7)
    del owner
    arena.close(is_kept=False)


def test_the_checksum_is_of_the_slot_and_the_name(tmp_path: Path) -> None:
    arena = make_arena(tmp_path)
    fill(arena, 1, 5)
    assert arena.checksum(1, name(5)) == block(5).checksum
    assert arena.checksum(1, name(6)) != block(6).checksum
    arena.close(is_kept=False)


def test_what_was_committed_is_found_by_the_next_manager(tmp_path: Path) -> None:
    arena = make_arena(tmp_path)
    for slot, number in ((0, 10), (5, 11), (6, 12)):
        fill(arena, slot, number)
        arena.commit(slot, block(number))
    fill(arena, 7, 13)
    arena.clear([5])
    arena.close(is_kept=True)
    again = make_arena(tmp_path)
    assert list(again.recovered()) == [(0, block(10)), (6, block(12))]
    assert bytes(again.view(6)) == content(12)
    again.close(is_kept=False)


def test_a_damaged_record_is_not_recovered(tmp_path: Path) -> None:
    arena = make_arena(tmp_path)
    arena.commit(0, block(1))
    arena.commit(1, block(2))
    arena.close(is_kept=True)
    flip(arena.path, 4096 + 40)
    again = make_arena(tmp_path)
    assert list(again.recovered()) == [(1, block(2))]
    again.close(is_kept=False)


def test_an_orderly_stop_leaves_nothing_behind(tmp_path: Path) -> None:
    arena = make_arena(tmp_path)
    arena.commit(0, block(1))
    arena.close(is_kept=False)
    arena.close(is_kept=False)
    assert list(tmp_path.iterdir()) == []


def test_wiping_overwrites_the_bytes(tmp_path: Path) -> None:
    arena = make_arena(tmp_path)
    for slot in (0, 1):
        fill(arena, slot, 3)
    arena.clear([0], is_wiped=True)
    assert bytes(arena.view(0)) == bytes(BLOCK_BYTES)
    assert bytes(arena.view(1)) == content(3)
    arena.close(is_kept=False)


def test_two_managers_never_share_an_arena(tmp_path: Path) -> None:
    first, second = make_arena(tmp_path), make_arena(tmp_path)
    assert first.path != second.path
    fill(first, 0, 1)
    assert bytes(second.view(0)) != content(1)
    first.close(is_kept=False)
    second.close(is_kept=False)


@pytest.mark.parametrize("damage", ["other space", "other size", "header", "cut"])
def test_what_is_not_this_space_is_replaced(tmp_path: Path, damage: str) -> None:
    arena = make_arena(tmp_path, space=OTHER if damage == "other space" else SPACE)
    fill(arena, 0, 1)
    arena.commit(0, block(1))
    arena.close(is_kept=True)
    if damage == "header":
        flip(arena.path, 20)
    if damage == "cut":
        os.truncate(arena.path, arena.path.stat().st_size - 1)
    again = make_arena(tmp_path, num_slots=9 if damage == "other size" else 8)
    assert list(again.recovered()) == []
    assert bytes(again.view(0)) == bytes(BLOCK_BYTES)
    assert len(list(again.path.parent.iterdir())) == 1
    again.close(is_kept=False)


def test_an_automatic_arena_is_taken_as_large_as_it_was_left(tmp_path: Path) -> None:
    arena = make_arena(tmp_path, num_slots=5)
    arena.commit(4, block(1))
    arena.close(is_kept=True)
    again = open_arena(KvManagerConfig(arena_folder=tmp_path / "arena"), SPACE, BLOCK_BYTES)
    assert again.num_slots == 5
    assert list(again.recovered()) == [(4, block(1))]
    again.close(is_kept=False)


def test_an_automatic_arena_takes_its_share_of_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "free_memory_bytes", lambda: 100 * STRIDE)
    config = KvManagerConfig(arena_folder=tmp_path / "arena", host_memory_fraction=0.25)
    arena = open_arena(config, SPACE, BLOCK_BYTES)
    assert arena.num_slots == 25
    arena.close(is_kept=False)


@pytest.mark.parametrize("host_bytes", [100 * STRIDE, STRIDE - 1])
def test_a_size_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_bytes: int) -> None:
    monkeypatch.setattr(arena_module, "free_memory_bytes", lambda: 99 * STRIDE)
    with pytest.raises(ConfigError, match=rf"kv_manager.host_bytes: {host_bytes} bytes"):
        open_arena(KvManagerConfig(arena_folder=tmp_path / "arena", host_bytes=host_bytes), SPACE, BLOCK_BYTES)
    assert list(tmp_path.iterdir()) == []


def test_a_full_memory_halves_an_automatic_arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "free_memory_bytes", lambda: 16 * STRIDE)
    true_map = ArenaFile.map

    def map_if_small(file: ArenaFile, use_huge_pages: bool) -> object:
        assert file.shape is not None
        if file.shape.num_slots > 4:
            raise OSError(28, "No space left on device")
        return true_map(file, use_huge_pages)

    monkeypatch.setattr(ArenaFile, "map", map_if_small)
    folder = tmp_path / "arena"
    arena = open_arena(KvManagerConfig(arena_folder=folder, host_memory_fraction=1.0), SPACE, BLOCK_BYTES)
    assert arena.num_slots == 4
    arena.close(is_kept=False)
    with pytest.raises(ConfigError, match="kv_manager.host_bytes"):
        open_arena(KvManagerConfig(arena_folder=folder, host_bytes=8 * STRIDE), SPACE, BLOCK_BYTES)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "arena"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="kv_manager.arena_folder"):
        make_arena(tmp_path)


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / "arena").mkdir(mode=0o700)
    (tmp_path / "arena" / "arena-0").symlink_to(target)
    with pytest.raises(ConfigError, match="kv_manager.arena_folder"):
        make_arena(tmp_path)
    assert target.read_bytes() == b"precious"
