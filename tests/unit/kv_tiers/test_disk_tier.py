"""The disk tier on real files; what survives restarts, damage, other keys and a disk that hangs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from kelp.core.config_kv import DiskTierConfig
from kelp.core.errors import ConfigError
from kelp.kv.tiers.arena import FileArena
from kelp.kv.tiers.disk import opening, tier
from kelp.kv.tiers.disk.folder import Manifest, _digest
from kelp.transport.base import FileTransfer, MoveOutcome, Region, SlotFile, StuckSlots
from kelp.transport.files import PlainFiles
from support.tier_rig import (
    BLOCK_BYTES,
    SPACE,
    STRIDE,
    block,
    content,
    data_file,
    disk_config,
    fill,
    flip,
    make_arena,
    open_disk,
    read,
    write,
)

KEYS = {"plain": None, "sealed": b"k" * 32}


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[FileArena]:
    arena = make_arena(tmp_path)
    yield arena
    arena.close(is_kept=False)


@pytest.fixture(params=["plain", "sealed"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> DiskTierConfig:
    key = KEYS[request.param]
    if key is None:
        return disk_config(tmp_path)
    (tmp_path / "key").write_bytes(key)
    return disk_config(tmp_path, key_file=tmp_path / "key")


def without_key(config: DiskTierConfig) -> DiskTierConfig:
    return config.model_copy(update={"key_file": None})


@pytest.mark.parametrize("direct_io", ["auto", "never"])
def test_blocks_come_back_as_they_were_also_after_a_restart(
    config: DiskTierConfig, arena: FileArena, direct_io: str
) -> None:
    config = config.model_copy(update={"direct_io": direct_io})
    disk = open_disk(config, arena)
    assert list(disk.recovered()) == []
    assert write(disk, arena, {0: 10, 7: 11, 3: 12}) == [True, True, True]
    assert read(disk, arena, 7, 11)
    disk.close()
    again = open_disk(config, arena)
    assert list(again.recovered()) == [(0, block(10)), (3, block(12)), (7, block(11))]
    assert all(read(again, arena, slot, number) for slot, number in {0: 10, 7: 11, 3: 12}.items())
    again.close()


def test_many_blocks_in_several_batches(
    config: DiskTierConfig, arena: FileArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier, "_BATCH_BYTES", STRIDE)
    disk = open_disk(config, arena)
    assert write(disk, arena, {slot: 20 + slot for slot in range(8)}) == [True] * 8
    arena.clear(range(8), is_wiped=True)
    moves = [(slot, 7 - slot, block(20 + slot)) for slot in range(8)]
    assert disk.read(moves) == [True] * 8
    assert [bytes(arena.view(7 - slot)) for slot in range(8)] == [content(20 + slot) for slot in range(8)]
    assert disk.read([]) == [] and disk.write([]) == []
    disk.close()


def test_a_damaged_block_is_found_and_the_others_are_read(config: DiskTierConfig, arena: FileArena) -> None:
    disk = open_disk(config, arena)
    write(disk, arena, {0: 1, 1: 2, 2: 3})
    disk.close()
    flip(data_file(config), STRIDE + 100)
    again = open_disk(config, arena)
    assert again.read([(slot, slot, block(slot + 1)) for slot in range(3)]) == [True, False, True]
    assert again.counts.num_corrupt == 1
    assert write(again, arena, {1: 2}) == [True]
    assert read(again, arena, 1, 2)
    again.close()


def test_a_block_asked_for_under_another_name_is_not_right(config: DiskTierConfig, arena: FileArena) -> None:
    disk = open_disk(config, arena)
    write(disk, arena, {0: 1})
    assert not read(disk, arena, 0, 2)
    assert not read(disk, arena, 5, 1)
    disk.close()


def test_an_overwritten_slot_holds_the_new_block_only(config: DiskTierConfig, arena: FileArena) -> None:
    disk = open_disk(config, arena)
    write(disk, arena, {0: 1})
    write(disk, arena, {0: 2})
    assert not read(disk, arena, 0, 1)
    assert read(disk, arena, 0, 2)
    disk.close()


def test_cleared_slots_stay_cleared(config: DiskTierConfig, arena: FileArena) -> None:
    disk = open_disk(config, arena)
    write(disk, arena, {0: 1, 1: 2, 2: 3})
    disk.clear([1])
    assert not read(disk, arena, 1, 2)
    disk.close()
    again = open_disk(config, arena)
    assert [slot for slot, _ in again.recovered()] == [0, 2]
    again.close()


def test_a_wiped_slot_leaves_no_bytes_in_the_file_and_can_be_used_again(tmp_path: Path, arena: FileArena) -> None:
    config = disk_config(tmp_path)
    disk = open_disk(config, arena)
    write(disk, arena, {0: 1, 1: 2, 2: 3})
    allocated = data_file(config).stat().st_blocks
    disk.clear([0, 2], is_wiped=True)
    raw = data_file(config).read_bytes()
    assert content(1)[:64] not in raw and content(3)[:64] not in raw
    assert content(2) in raw
    assert data_file(config).stat().st_blocks >= allocated
    assert write(disk, arena, {0: 4}) == [True]
    assert read(disk, arena, 0, 4) and read(disk, arena, 1, 2)
    disk.close()


def test_a_wipe_that_the_disk_refuses_is_made_up_for(
    tmp_path: Path, arena: FileArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = disk_config(tmp_path)
    disk = open_disk(config, arena)
    write(disk, arena, {0: 1})
    with monkeypatch.context() as patched:
        patched.setattr(disk._slots, "wipe", refuse)
        disk.clear([0], is_wiped=True)
        assert write(disk, arena, {0: 2}) == [False]
    assert disk.owes_wipes
    assert content(1) in data_file(config).read_bytes()
    disk.clear([])
    assert write(disk, arena, {1: 3}) == [True]
    assert content(1) not in data_file(config).read_bytes()
    assert write(disk, arena, {0: 2}) == [True]
    assert not disk.owes_wipes
    disk.close()


def refuse(*_: object) -> None:
    raise OSError(5, "Input/output error")


def test_records_that_cannot_be_written_are_blocks_that_are_not_there(
    config: DiskTierConfig, arena: FileArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = open_disk(config, arena)
    with monkeypatch.context() as patched:
        patched.setattr(disk._slots, "write_record", refuse)
        assert write(disk, arena, {0: 1}) == [False]
        patched.setattr(disk._slots, "forget", refuse)
        assert write(disk, arena, {0: 1}) == [False]
        disk.clear([0])
    assert disk.counts.num_failed == 2
    assert list(disk.recovered()) == []
    disk.close()


def test_encrypted_blocks_do_not_show(tmp_path: Path, arena: FileArena) -> None:
    (tmp_path / "key").write_bytes(b"k" * 32)
    config = disk_config(tmp_path, key_file=tmp_path / "key")
    disk = open_disk(config, arena)
    write(disk, arena, {0: 1})
    disk.close()
    assert content(1)[:32] not in data_file(config).read_bytes()
    assert (b"k" * 32).hex() not in data_file(config, "manifest.json").read_text()


def test_under_another_key_nothing_is_found_and_nothing_is_lost(tmp_path: Path, arena: FileArena) -> None:
    (tmp_path / "key").write_bytes(b"k" * 32)
    (tmp_path / "other").write_bytes(b"o" * 32)
    config = disk_config(tmp_path, key_file=tmp_path / "key")
    disk = open_disk(config, arena)
    write(disk, arena, {0: 1, 1: 2})
    disk.close()
    for wrong in (disk_config(tmp_path, key_file=tmp_path / "other"), without_key(config)):
        foreign = open_disk(wrong, arena)
        assert list(foreign.recovered()) == []
        assert foreign.counts.num_foreign == 2
        assert not read(foreign, arena, 0, 1)
        foreign.close()
    again = open_disk(config, arena)
    assert [slot for slot, _ in again.recovered()] == [0, 1]
    assert read(again, arena, 0, 1)
    again.close()


def test_another_space_gets_a_folder_of_its_own(tmp_path: Path, arena: FileArena) -> None:
    other = msgspec.structs.replace(SPACE, hash_version=2)
    small = disk_config(tmp_path, num_slots=3)
    disk = open_disk(small, arena)
    write(disk, arena, {0: 1})
    with pytest.raises(ConfigError, match=r"disk_tier.max_bytes.*no room"):
        open_disk(small, arena, other)
    large = disk_config(tmp_path, num_slots=8)
    beside = open_disk(large, arena, other)
    assert 4 <= beside.num_slots <= 5
    assert list(beside.recovered()) == []
    beside.close()
    assert read(disk, arena, 0, 1)
    disk.close()


def test_the_oldest_space_nobody_uses_makes_room(tmp_path: Path, arena: FileArena) -> None:
    config = disk_config(tmp_path)
    open_disk(config, arena).close()
    before = data_file(config).parent
    disk = open_disk(config, arena, msgspec.structs.replace(SPACE, model_id="n"))
    assert disk.num_slots == 8
    assert not before.exists()
    disk.close()


def test_an_unknown_format_is_left_alone(tmp_path: Path, arena: FileArena) -> None:
    config = disk_config(tmp_path, num_slots=2)
    open_disk(config, arena).close()
    manifest = data_file(config, "manifest.json")
    fields = json.loads(manifest.read_text())
    del fields["digest"]
    fields["format"] = 99
    text = json.dumps({**fields, "digest": _digest(fields)})
    manifest.write_text(text)
    disk = open_disk(disk_config(tmp_path, num_slots=8), arena)
    assert disk.num_slots > 0
    assert disk._folder.path != manifest.parent
    disk.close()


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]", b'{"digest": 1}', b'"x"', b"null"])
def test_a_damaged_manifest_is_written_anew_and_costs_nothing(
    config: DiskTierConfig, arena: FileArena, damage: bytes
) -> None:
    disk = open_disk(config, arena)
    write(disk, arena, {0: 1})
    disk.close()
    manifest = data_file(config, "manifest.json")
    before = manifest.read_text()
    manifest.write_bytes(damage)
    again = open_disk(config, arena)
    assert list(again.recovered()) == [(0, block(1))]
    assert manifest.read_text() == before
    again.close()


def test_the_manifest_says_what_the_folder_is(tmp_path: Path, arena: FileArena) -> None:
    config = disk_config(tmp_path)
    open_disk(config, arena).close()
    fields = json.loads(data_file(config, "manifest.json").read_text())
    del fields["digest"]
    assert Manifest(**fields) == Manifest(
        {field: getattr(SPACE, field) for field in SPACE.__struct_fields__}, BLOCK_BYTES, STRIDE, 8, ""
    )


def test_a_folder_in_use_is_refused(tmp_path: Path, arena: FileArena) -> None:
    disk = open_disk(disk_config(tmp_path), arena)
    with pytest.raises(ConfigError, match="disk_tier.path: .*in use"):
        open_disk(disk_config(tmp_path), arena)
    disk.close()
    disk.close()


def test_a_larger_bound_keeps_what_is_there(config: DiskTierConfig, arena: FileArena) -> None:
    disk = open_disk(config, arena)
    write(disk, arena, {0: 1, 7: 2})
    disk.close()
    grown = open_disk(config.model_copy(update={"max_bytes": 2 * config.max_bytes}), arena)
    assert grown.num_slots == 16
    assert list(grown.recovered()) == [(0, block(1)), (7, block(2))]
    assert write(grown, arena, {15: 3}) == [True]
    assert read(grown, arena, 7, 2) and read(grown, arena, 15, 3)
    grown.close()


def test_a_smaller_bound_keeps_what_still_fits(config: DiskTierConfig, arena: FileArena) -> None:
    disk = open_disk(config, arena)
    write(disk, arena, {0: 1, 5: 2, 6: 3, 7: 4})
    disk.close()
    shrunk = open_disk(config.model_copy(update={"max_bytes": config.max_bytes * 3 // 8}), arena)
    found = list(shrunk.recovered())
    assert shrunk.num_slots == 3
    assert len(found) == 3 and (0, block(1)) in found
    assert all(read(shrunk, arena, slot, record.position) for slot, record in found)
    assert data_file(config).stat().st_size == 3 * STRIDE
    shrunk.close()


def test_progress_of_a_long_recovery_is_logged(
    tmp_path: Path, arena: FileArena, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tier, "_PROGRESS_SLOTS", 2)
    disk = open_disk(disk_config(tmp_path), arena)
    write(disk, arena, {slot: slot for slot in range(8)})
    with caplog.at_level(logging.INFO):
        assert len(list(disk.recovered())) == 8
    assert sum("of 8 slots looked at" in message for message in caplog.messages) == 3
    assert "8 blocks found" in caplog.messages[-1]
    disk.close()


def test_direct_io_that_the_file_system_lacks_is_named(
    tmp_path: Path, arena: FileArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_direct_io_fault", lambda path: "Invalid argument")
    with pytest.raises(ConfigError, match="disk_tier.direct_io: always.*Invalid argument"):
        open_disk(disk_config(tmp_path, direct_io="always"), arena)
    disk = open_disk(disk_config(tmp_path), arena)
    assert write(disk, arena, {0: 1}) == [True]
    disk.close()


@pytest.mark.parametrize("max_bytes", [0, STRIDE])
def test_a_bound_below_one_block_is_named(tmp_path: Path, arena: FileArena, max_bytes: int) -> None:
    config = disk_config(tmp_path).model_copy(update={"max_bytes": max_bytes})
    with pytest.raises(ConfigError, match=f"disk_tier.max_bytes: {max_bytes} bytes"):
        open_disk(config, arena)


class HangingFiles(PlainFiles):
    """Plain files; transfers of `hangs` never end until it is emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.hangs: set[int] = set()
        self.caught: dict[int, tuple[SlotFile, Region, tuple[int, int]]] = {}

    def start_read(self, file: SlotFile, region: Region, moves: Sequence[tuple[int, int]]) -> FileTransfer:
        return self._catch(file, region, moves) or super().start_read(file, region, moves)

    def start_write(self, file: SlotFile, region: Region, moves: Sequence[tuple[int, int]]) -> FileTransfer:
        return self._catch(file, region, moves) or super().start_write(file, region, moves)

    def _catch(self, file: SlotFile, region: Region, moves: Sequence[tuple[int, int]]) -> FileTransfer | None:
        if not self.hangs & {slot for _, slot in moves}:
            return None
        self.caught.update({slot: (file, region, (memory, slot)) for memory, slot in moves})
        return Late(len(moves))

    def stuck(self) -> StuckSlots:
        held = [entry for slot, entry in self.caught.items() if slot in self.hangs]
        return StuckSlots(
            frozenset((region, memory) for _, region, (memory, _) in held),
            frozenset((file.fd, slot) for file, _, (_, slot) in held),
        )


class Late:
    def __init__(self, num_moves: int) -> None:
        self._num_moves = num_moves

    def wait(self, timeout_s: float) -> list[MoveOutcome]:
        return [MoveOutcome.LATE] * self._num_moves


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> HangingFiles:
    files = HangingFiles()
    monkeypatch.setattr(opening, "open_file_transport", lambda is_direct: files)
    monkeypatch.setattr(tier, "_BATCH_BYTES", STRIDE)
    monkeypatch.setattr(tier, "_NUM_BATCHES", 4)
    return files


def test_what_a_hanging_disk_holds_is_not_used_until_it_lets_go(
    config: DiskTierConfig, arena: FileArena, hanging: HangingFiles
) -> None:
    disk = open_disk(config, arena)
    assert write(disk, arena, {1: 1, 2: 2}) == [True, True]
    hanging.hangs = {2}
    assert disk.read([(1, 3, block(1)), (2, 4, block(2))]) == [True, False]
    assert disk.counts.num_late == 1 and disk.num_stuck == 1
    assert disk.stuck_slots == (frozenset() if config.key_file else frozenset({4}))
    fill(arena, 5, 9)
    assert disk.write([(5, 2, block(9))]) == [False]
    hanging.hangs = set()
    assert disk.stuck_slots == frozenset() and disk.num_stuck == 0
    assert disk.write([(5, 2, block(9))]) == [True]
    assert read(disk, arena, 2, 9)
    disk.close()


def test_staging_memory_of_a_hanging_disk_is_out_of_use_and_comes_back(
    tmp_path: Path, arena: FileArena, hanging: HangingFiles
) -> None:
    (tmp_path / "key").write_bytes(b"k" * 32)
    disk = open_disk(disk_config(tmp_path, key_file=tmp_path / "key"), arena)
    hanging.hangs = {0, 1, 2, 3}
    assert write(disk, arena, {0: 1, 1: 2, 2: 3, 3: 4}) == [False] * 4
    assert write(disk, arena, {5: 5}) == [False]
    hanging.hangs = set()
    assert write(disk, arena, {5: 5}) == [True]
    assert read(disk, arena, 5, 5)
    disk.close()


def test_a_wipe_waits_for_a_hanging_write(tmp_path: Path, arena: FileArena, hanging: HangingFiles) -> None:
    config = disk_config(tmp_path)
    disk = open_disk(config, arena)
    write(disk, arena, {2: 1})
    hanging.hangs = {2}
    assert write(disk, arena, {2: 1}) == [False]
    disk.clear([2], is_wiped=True)
    assert content(1) in data_file(config).read_bytes()
    assert disk.owes_wipes
    hanging.hangs = set()
    disk.clear([], is_wiped=True)
    assert not disk.owes_wipes
    assert content(1) not in data_file(config).read_bytes()
    disk.close()
