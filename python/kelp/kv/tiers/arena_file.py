"""The file behind the host arena: who owns it, what it is, and that all of it is really there.

On tmpfs a file is memory that outlives its process: after a crash the next manager of the same space finds it. A lock
keeps two managers apart. Pages are allocated before they are used, because a full tmpfs answers a store with SIGBUS.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from kelp.core.errors import ConfigError
from kelp.kv.tiers.records import RECORD_BYTES

_log = logging.getLogger(__name__)

PAGE_BYTES = 4096
_HUGE_PAGE_BYTES = 2 * 1024 * 1024
_MAX_ARENAS = 64
"""Managers of one user that share a folder."""
_HEADER = struct.Struct("<16s16sQQQQ")
_CRC = struct.Struct("<I")
_MAGIC = b"kelp-kv-arena-1\0"
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_MOUNTS = Path("/proc/self/mountinfo")


def round_up(num_bytes: int, unit: int) -> int:
    """To a multiple of `unit`."""
    return -(-num_bytes // unit) * unit


@dataclass(frozen=True, slots=True)
class ArenaShape:
    """What lies where in the file: a header, the records, the slots."""

    space: bytes
    block_bytes: int
    num_slots: int

    @property
    def stride_bytes(self) -> int:
        """From slot to slot."""
        return round_up(self.block_bytes, PAGE_BYTES)

    @property
    def records_offset(self) -> int:
        """Of the first record."""
        return PAGE_BYTES

    @property
    def slots_offset(self) -> int:
        """Of the first slot; at a huge page, so that blocks share as few as possible."""
        return round_up(self.records_offset + self.num_slots * RECORD_BYTES, _HUGE_PAGE_BYTES)

    @property
    def file_bytes(self) -> int:
        """Of all."""
        return self.slots_offset + self.num_slots * self.stride_bytes

    def header(self) -> bytes:
        """First bytes of the file."""
        numbers = (self.block_bytes, self.stride_bytes, self.num_slots, self.slots_offset)
        body = _HEADER.pack(_MAGIC, self.space, *numbers)
        return body + _CRC.pack(zlib.crc32(body))


def _read_shape(fd: int) -> ArenaShape | None:
    raw = os.pread(fd, _HEADER.size + _CRC.size, 0)
    if len(raw) < _HEADER.size + _CRC.size:
        return None
    _, space, block_bytes, _, num_slots, _ = _HEADER.unpack_from(raw)
    shape = ArenaShape(space, block_bytes, num_slots)
    try:
        is_whole = raw == shape.header() and os.fstat(fd).st_size == shape.file_bytes
    except struct.error:
        # Numbers so large that what follows from them has no place in a header: nobody wrote them on purpose.
        return None
    return shape if is_whole else None


@dataclass(eq=False)
class ArenaFile:
    """A file that this process has locked; `shape` is None while it is empty."""

    path: Path
    fd: int
    shape: ArenaShape | None

    def remove(self) -> None:
        """Delete the file and let go of it; the folder too, if it was the last."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self.release()
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()

    def release(self) -> None:
        """Let go of the file and leave it."""
        os.close(self.fd)

    def empty(self) -> None:
        """Give back all of its memory."""
        os.ftruncate(self.fd, 0)
        self.shape = None

    def create(self, shape: ArenaShape) -> None:
        """Empty the file and give it its size; its header comes with `complete`."""
        self.empty()
        os.ftruncate(self.fd, shape.file_bytes)
        self.shape = shape

    def map(self, use_huge_pages: bool) -> mmap.mmap:
        """All of the file in memory, every page allocated.

        Raises:
            OSError: ENOSPC or ENOMEM: there is not so much.
        """
        assert self.shape is not None
        mapping = mmap.mmap(self.fd, self.shape.file_bytes)
        try:
            if use_huge_pages and _gives_huge_pages_on_advice(self.fd):
                # Allocating by itself knows no advice. Populating small pages would take many times as long as that.
                _advise(mapping, _MADV_HUGEPAGE)
                _advise(mapping, _MADV_POPULATE_WRITE)
            os.posix_fallocate(self.fd, 0, self.shape.file_bytes)
        except BaseException:
            mapping.close()
            raise
        return mapping

    def complete(self) -> None:
        """From now on the file is an arena, also for the next process."""
        assert self.shape is not None
        os.pwrite(self.fd, self.shape.header(), 0)


def _gives_huge_pages_on_advice(fd: int) -> bool:
    """By the mount: `transparent_hugepage/shmem_enabled` is for memory without a file in a folder."""
    device = os.fstat(fd).st_dev
    mount = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return False
    return any(line.split()[2] == mount and "huge=advise" in line.split()[-1].split(",") for line in lines)


def _advise(mapping: mmap.mmap, advice: int) -> None:
    # Not mapping.madvise: it holds the interpreter for the seconds that populating takes. A refusal costs only speed.
    anchor = ctypes.c_char.from_buffer(mapping)
    status = ctypes.CDLL(None, use_errno=True).madvise(
        ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(len(mapping)), advice
    )
    if status:
        _log.debug("arena: madvise %d: %s", advice, os.strerror(ctypes.get_errno()))


def claim_arena(folder: Path, space: bytes, block_bytes: int) -> ArenaFile:
    """Lock an arena of this space that a dead process left, or an empty file; those of other spaces are removed.

    Raises:
        ConfigError: The folder is not ours alone, or cannot be used; names `kv_manager.arena_folder`.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(folder)
        found = _adopt(folder, space, block_bytes)
        return found or _create(folder)
    except OSError as error:
        raise ConfigError(f"kv_manager.arena_folder: {folder}: {error.strerror}") from None


def _check_owner(folder: Path) -> None:
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ConfigError(f"kv_manager.arena_folder: {folder} belongs to others or can be written by them")


def _adopt(folder: Path, space: bytes, block_bytes: int) -> ArenaFile | None:
    for path in sorted(folder.glob("arena-*")):
        file = _lock(path, os.O_RDWR)
        if file is None:
            continue
        file.shape = _read_shape(file.fd)
        if file.shape is None or file.shape.space != space or file.shape.block_bytes != block_bytes:
            _log.info("arena: %s is of another space or was never completed: removed", path)
            file.remove()
            folder.mkdir(mode=0o700, exist_ok=True)
        else:
            return file
    return None


def _create(folder: Path) -> ArenaFile:
    for number in range(_MAX_ARENAS):
        try:
            file = _lock(folder / f"arena-{number}", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            continue
        if file is not None:
            return file
    raise ConfigError(f"kv_manager.arena_folder: {folder} is in use by {_MAX_ARENAS} managers, the most there can be")


def _lock(path: Path, flags: int) -> ArenaFile | None:
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino == os.fstat(fd).st_ino:
            return ArenaFile(path, fd, None)
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def is_no_space(error: OSError) -> bool:
    """Whether memory or a file system is full."""
    return error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)
