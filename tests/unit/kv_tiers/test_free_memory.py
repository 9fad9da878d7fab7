from __future__ import annotations

from pathlib import Path

import pytest

from kelp.kv.tiers.memory import free_memory_bytes


def files(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file, value in values.items():
        (folder / file.replace("__", ".", 1)).write_text(f"{value}\n")


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def test_without_groups_the_machine_is_the_limit(membership: Path, tmp_path: Path) -> None:
    machine = free_memory_bytes(membership, tmp_path / "none")
    assert machine > 2**20


def test_a_group_of_version_2_bounds_memory_and_page_cache_is_free(membership: Path, tmp_path: Path) -> None:
    membership.write_text("0::/a/b\n")
    files(tmp_path / "fs/a/b", memory__max="max", memory__current=500)
    files(tmp_path / "fs/a", memory__max=1000, memory__current=700, memory__stat="anon 600\ninactive_file 50")
    assert free_memory_bytes(membership, tmp_path / "fs") == 350


def test_a_group_of_version_1_bounds_memory(membership: Path, tmp_path: Path) -> None:
    membership.write_text("5:cpu,cpuacct:/x\n4:memory:/x\n")
    files(tmp_path / "fs/memory/x", memory__limit_in_bytes=900, memory__usage_in_bytes=1000)
    assert free_memory_bytes(membership, tmp_path / "fs") == 0


def test_in_a_container_the_mounted_root_counts(membership: Path, tmp_path: Path) -> None:
    membership.write_text("0::/only/outside\n")
    files(tmp_path / "fs", memory__max=1000, memory__current=1)
    assert free_memory_bytes(membership, tmp_path / "fs") == 999
