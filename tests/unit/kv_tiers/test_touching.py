"""Memory is touched ahead of its use, and stays as it is."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile

import pytest

from kelp.kv.tiers.touching import Touching

NUM_BYTES = 3 * 1024 * 1024 + 4096


def mapped() -> mmap.mmap:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.truncate(file.fileno(), NUM_BYTES)
        return mmap.mmap(file.fileno(), NUM_BYTES)


def resident_pages(address: int) -> int:
    """Pages of the mapping that this process has in its page table."""
    size = mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(address // size * 8)
        entries = pagemap.read(NUM_BYTES // size * 8)
    return sum(entries[index + 7] >> 7 for index in range(0, len(entries), 8))


def can_touch() -> bool:
    """Linux has known how since 5.14; asked for nothing, it says whether it does."""
    return sys.platform == "linux" and ctypes.CDLL(None).madvise(None, ctypes.c_size_t(0), 23) == 0


@pytest.mark.skipif(not can_touch(), reason="the kernel cannot touch pages ahead")
def test_every_page_is_touched_and_none_is_changed() -> None:
    memory = mapped()
    memory[5000:5004] = b"kept"
    anchor = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(anchor)
    assert resident_pages(address) < NUM_BYTES // mmap.PAGESIZE
    touching = Touching(address, NUM_BYTES)
    touching.wait()
    assert resident_pages(address) == NUM_BYTES // mmap.PAGESIZE
    assert memory[5000:5004] == b"kept"
    assert not any(memory[5004:])
    touching.stop()


def test_touching_can_be_stopped_at_any_time() -> None:
    memory = mapped()
    anchor = ctypes.c_char.from_buffer(memory)
    touching = Touching(ctypes.addressof(anchor), NUM_BYTES)
    touching.stop()
    touching.stop()
    del anchor
    memory.close()
