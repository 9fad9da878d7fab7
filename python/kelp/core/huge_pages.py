"""A loaded process's heap on huge pages.

A request's way through a server of several processes finds what it runs cold: the others have used the caches since,
and the address cache, whose every miss costs two walks in a virtual machine. With 2 MB pages the objects of a process
need a few entries instead of thousands. Python's own arenas are too small for the kernel to do so by itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_PAGE_BYTES = 4096
_HUGE_BYTES = 2 << 20
_PAGES = _HUGE_BYTES // _PAGE_BYTES
_LARGEST_MAPPING = 64 << 20
"""Larger ones are pools, which have rules of their own."""
_LEAST_USED = _PAGES // 4
"""Pages in use below which a huge one would cost more memory than it is worth, as in a thread's stack."""
_MADV_COLLAPSE = 25
"""Linux 6.1; what cannot be moved stays as it is."""


def collapse_heap() -> int:
    """Move this process's private memory, as it is now, to huge pages; for when loading is over.

    Takes up to 0.2 s, and at most four times the memory that is in use where a huge page goes.

    Returns:
        Bytes on huge pages; 0 where the kernel has none for us.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "madvise") or not hasattr(libc, "mincore"):
        return 0
    in_core = (ctypes.c_ubyte * _PAGES)()
    num_bytes = 0
    for address in _heap():
        place, length = ctypes.c_void_p(address), ctypes.c_size_t(_HUGE_BYTES)
        is_worth_it = libc.mincore(place, length, in_core) == 0 and sum(in_core) >= _LEAST_USED
        if is_worth_it and libc.madvise(place, length, _MADV_COLLAPSE) == 0:
            num_bytes += _HUGE_BYTES
    return num_bytes


def _heap() -> Iterator[int]:
    """Where a huge page would lie in anonymous memory that can be written to."""
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        span, access, _, _, _, *name = line.split(maxsplit=5)
        first, end = (int(bound, 16) for bound in span.split("-"))
        if access == "rw-p" and name in ([], ["[heap]"]) and end - first <= _LARGEST_MAPPING:
            yield from range(-(-first // _HUGE_BYTES) * _HUGE_BYTES, end - _HUGE_BYTES + 1, _HUGE_BYTES)
