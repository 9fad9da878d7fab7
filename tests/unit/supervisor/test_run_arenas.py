"""What is left of a KV block manager's host tier is removed when its run ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from kelp.core.config import load_config
from kelp.supervisor import kv_manager
from kelp.supervisor.kv_manager import remove_arenas


def test_arenas_of_this_run_and_of_dead_ones_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_manager, "default_arena_folder", lambda: tmp_path)
    alive = {8101}
    monkeypatch.setattr(kv_manager.run_state, "read_state", lambda port: port if port in alive else None)
    for name in ("serve-8001", "serve-8101", "serve-8201", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "arena-0").touch()
    remove_arenas(load_config({"kv_manager.arena_folder": str(tmp_path / "serve-8001")}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "serve-8101"]


def test_what_is_still_to_be_cleared_stays_for_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_manager, "default_arena_folder", lambda: tmp_path)
    folder = tmp_path / "serve-8001"
    folder.mkdir()
    for name in ("arena-0", "arena-1", "clears-arena-0"):
        (folder / name).touch()
    remove_arenas(load_config({"kv_manager.arena_folder": str(folder)}))
    assert [path.name for path in folder.iterdir()] == ["clears-arena-0"]
