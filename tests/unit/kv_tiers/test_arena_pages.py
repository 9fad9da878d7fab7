"""How the arena's pages come to be there before anybody writes to them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kelp.kv.tiers import arena_file
from kelp.kv.tiers.arena_file import ArenaShape, claim_arena

SHAPE = ArenaShape(b"s" * 16, 4096, 64)
HUGE, POPULATE = 14, 23


def _advice_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, use_huge_pages: bool) -> list[int]:
    """Maps an arena on a system with this setting; every page is there however that was done."""
    given: list[int] = []
    switch = tmp_path / "shmem_enabled"
    switch.write_text(setting)
    monkeypatch.setattr(arena_file, "_HUGE_PAGES_OF_TMPFS", switch)
    monkeypatch.setattr(arena_file, "_advise", lambda _, advice: given.append(advice))
    file = claim_arena(tmp_path / "arena", SHAPE.space, SHAPE.block_bytes)
    try:
        file.create(SHAPE)
        file.map(use_huge_pages).close()
        assert os.fstat(file.fd).st_blocks * 512 >= SHAPE.file_bytes
    finally:
        file.remove()
    return given


@pytest.mark.parametrize("setting", ["[always] advise never", "always advise [never]"])
def test_pages_are_allocated_without_being_mapped_where_advice_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
):
    assert _advice_given(tmp_path, monkeypatch, setting, use_huge_pages=True) == []


def test_huge_pages_are_asked_for_where_the_system_gives_them_on_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    setting = "always within_size [advise] never deny force"
    assert _advice_given(tmp_path, monkeypatch, setting, use_huge_pages=True) == [HUGE, POPULATE]
    assert _advice_given(tmp_path, monkeypatch, setting, use_huge_pages=False) == []


def test_a_system_without_the_switch_has_ordinary_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arena_file, "_HUGE_PAGES_OF_TMPFS", tmp_path / "absent")
    file = claim_arena(tmp_path / "arena", SHAPE.space, SHAPE.block_bytes)
    file.create(SHAPE)
    file.map(use_huge_pages=True).close()
    file.remove()
