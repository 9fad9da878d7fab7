"""How the arena's pages come to be there before anybody writes to them."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path

import pytest

from kelp.kv.tiers import arena_file
from kelp.kv.tiers.arena_file import ArenaShape, claim_arena
from support.tmpfs import mounted_tmpfs

HUGE_PAGE = 2 * 1024 * 1024
SHAPE = ArenaShape(b"s" * 16, 4096, 2 * HUGE_PAGE // 4096)


def _huge_bytes(path: Path) -> int:
    """How much of this process's mapping of the file lies on huge pages."""
    mappings = Path("/proc/self/smaps").read_text().split(str(path))[1:]
    return sum(1024 * int(number) for text in mappings for number in re.findall(r"ShmemPmdMapped: +(\d+) kB", text)[:1])


def _map_arena(folder: Path, use_huge_pages: bool) -> int:
    """Maps an arena and writes to it; every page was there before, on whatever pages.

    Returns:
        Bytes on huge pages.
    """
    file = claim_arena(folder / "arena", SHAPE.space, SHAPE.block_bytes)
    try:
        file.create(SHAPE)
        mapping = file.map(use_huge_pages)
        assert os.fstat(file.fd).st_blocks * 512 >= SHAPE.file_bytes
        for page in range(0, SHAPE.file_bytes, mmap.PAGESIZE):
            mapping[page] = 1
        num_bytes = _huge_bytes(file.path)
        mapping.close()
    finally:
        file.remove()
    return num_bytes


def test_the_arena_lies_on_huge_pages_where_its_mount_gives_them_on_advice(tmp_path: Path):
    with mounted_tmpfs(tmp_path / "advised", "huge=advise,size=64m") as folder:
        assert _map_arena(folder, use_huge_pages=True) >= 2 * HUGE_PAGE
        assert _map_arena(folder, use_huge_pages=False) == 0


@pytest.mark.parametrize("options", ["size=64m", "huge=never,size=64m"])
def test_pages_are_ordinary_where_the_mount_knows_no_advice(tmp_path: Path, options: str):
    with mounted_tmpfs(tmp_path / "plain", options) as folder:
        assert _map_arena(folder, use_huge_pages=True) == 0


def test_pages_are_allocated_without_being_mapped_where_advice_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given: list[int] = []
    monkeypatch.setattr(arena_file, "_advise", lambda _, advice: given.append(advice))
    _map_arena(tmp_path, use_huge_pages=True)
    assert given == []


def test_a_system_that_does_not_tell_its_mounts_has_ordinary_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arena_file, "_MOUNTS", tmp_path / "absent")
    with mounted_tmpfs(tmp_path / "advised", "huge=advise,size=64m") as folder:
        assert _map_arena(folder, use_huge_pages=True) == 0
