"""The heap on huge pages: what is moved keeps its contents, and what is hardly used stays."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kelp.core import huge_pages
from kelp.core.huge_pages import collapse_heap

HUGE_BYTES = 2 << 20
PAGE_BYTES = 4096


@pytest.fixture
def mapping() -> Iterator[mmap.mmap]:
    """Private memory that holds at least one whole huge page."""
    with mmap.mmap(-1, 2 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        yield memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def only(monkeypatch: pytest.MonkeyPatch, memory: mmap.mmap) -> None:
    """Nothing but this memory is looked at."""
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    aligned = -(-first // HUGE_BYTES) * HUGE_BYTES
    monkeypatch.setattr(huge_pages, "_heap", lambda: iter([aligned]))


def test_memory_that_is_moved_keeps_its_contents(monkeypatch: pytest.MonkeyPatch, mapping: mmap.mmap) -> None:
    contents = random.Random(1).randbytes(len(mapping))
    mapping[:] = contents
    only(monkeypatch, mapping)
    if collapse_heap() == 0:
        pytest.skip("this kernel has no huge pages for us")
    assert mapping[:] == contents


def test_memory_that_is_hardly_used_is_left_alone(monkeypatch: pytest.MonkeyPatch, mapping: mmap.mmap) -> None:
    mapping[len(mapping) // 2] = 1
    only(monkeypatch, mapping)
    before = resident_bytes()
    assert collapse_heap() == 0
    assert resident_bytes() - before < HUGE_BYTES // 2


def test_only_private_anonymous_memory_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "600000-a00000 rw-p 00000000 00:00 0 \n"
        "c00000-e00000 rw-p 00000000 00:00 0                          [heap]\n"
        "1000000-1200000 r-xp 00000000 fd:00 12                       /usr/lib/libpython3.11.so\n"
        "1400000-1600000 rw-s 00000000 00:01 13                       /dev/shm/kelp_0_1\n"
        "1800000-1a00000 rw-p 00000000 00:00 0                        [stack]\n"
        "1c00000-1d00000 rw-p 00000000 00:00 0 \n"
        "2000000-8000000 rw-p 00000000 00:00 0 \n"
    )
    monkeypatch.setattr(huge_pages, "_MAPS", maps)
    assert list(huge_pages._heap()) == [0x600000, 0x800000, 0xC00000]


def test_without_a_map_of_its_memory_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huge_pages, "_MAPS", tmp_path / "none")
    assert collapse_heap() == 0
