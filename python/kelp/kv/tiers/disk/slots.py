"""The two files of a space: slots for bytes, all of them allocated, and a record for each.

A slot counts only with its record, and that is written after the bytes. Whatever is torn or lost in between is found
by CRC and checksum, so nothing here waits for the disk; `sync` makes durable what has been written, bytes first.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from kelp.kv.tiers.records import RECORD_BYTES, RecordFormat, SlotRecord
from kelp.transport.base import SlotFile

_log = logging.getLogger(__name__)

ALIGNMENT_BYTES = 4096
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_NO_RECORD = bytes(RECORD_BYTES)
_BATCH_SLOTS = 8192


class DiskSlots:
    """Slots and records in one folder, which this process has locked.

    Raises:
        OSError: From all calls but `record`: the disk refuses.
    """

    def __init__(self, folder: Path, slot_bytes: int, records: RecordFormat, is_direct: bool) -> None:
        self._slot_bytes = slot_bytes
        self._format = records
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._data = os.open(folder / "blocks", flags | (os.O_DIRECT if is_direct else 0), 0o600)
        self._records = os.open(folder / "records", flags, 0o600)
        self.num_slots = 0

    @property
    def file(self) -> SlotFile:
        """For a transport."""
        return SlotFile(self._data, self.num_slots, self._slot_bytes)

    @property
    def allocated_bytes(self) -> int:
        """What the files take already."""
        return sum(os.fstat(fd).st_blocks * 512 for fd in (self._data, self._records))

    @property
    def size_bytes(self) -> int:
        """Length of the file of slots."""
        return os.fstat(self._data).st_size

    def resize(self, num_slots: int) -> None:
        """Take or give back space; blocks move out of what is cut off as far as they fit."""
        old = os.fstat(self._data).st_size, os.fstat(self._records).st_size
        if old[0] > num_slots * self._slot_bytes:
            self._compact(num_slots, min(old[0] // self._slot_bytes, old[1] // RECORD_BYTES))
        try:
            for fd, size in ((self._data, num_slots * self._slot_bytes), (self._records, num_slots * RECORD_BYTES)):
                os.posix_fallocate(fd, 0, size)
                os.ftruncate(fd, size)
        except OSError:
            os.ftruncate(self._data, min(old[0], num_slots * self._slot_bytes))
            os.ftruncate(self._records, min(old[1], num_slots * RECORD_BYTES))
            raise
        self.num_slots = num_slots

    def _compact(self, num_slots: int, num_old: int) -> None:
        used = dict(self._scan(num_old))
        free = iter(slot for slot in range(num_slots) if slot not in used)
        buffer = mmap.mmap(-1, self._slot_bytes)
        for slot, record in used.items():
            if slot < num_slots:
                continue
            target = next(free, None)
            if target is None:
                break
            if os.preadv(self._data, [buffer], slot * self._slot_bytes) == self._slot_bytes:
                os.pwritev(self._data, [buffer], target * self._slot_bytes)
                self.write_record(target, record)
        buffer.close()
        self.sync()

    def record(self, slot: int) -> SlotRecord | None:
        """What lies in a slot."""
        try:
            return self._format.unpack(slot, os.pread(self._records, RECORD_BYTES, slot * RECORD_BYTES))
        except OSError as error:
            _log.warning("disk tier: record of slot %d: %s", slot, error)
            return None

    def records(self) -> Iterator[tuple[int, SlotRecord]]:
        """All that can be trusted."""
        return self._scan(self.num_slots)

    def _scan(self, num_slots: int) -> Iterator[tuple[int, SlotRecord]]:
        for first in range(0, num_slots, _BATCH_SLOTS):
            raw = memoryview(os.pread(self._records, _BATCH_SLOTS * RECORD_BYTES, first * RECORD_BYTES))
            for slot in range(first, min(first + _BATCH_SLOTS, num_slots)):
                offset = (slot - first) * RECORD_BYTES
                record = self._format.unpack(slot, raw[offset : offset + RECORD_BYTES])
                if record is not None:
                    yield slot, record

    def write_record(self, slot: int, record: SlotRecord) -> None:
        """From now on the slot holds this block."""
        os.pwrite(self._records, self._format.pack(slot, record), slot * RECORD_BYTES)

    def forget(self, slots: Iterable[int]) -> None:
        """The slots hold nothing any more."""
        for first, count in _runs(slots):
            os.pwrite(self._records, _NO_RECORD * count, first * RECORD_BYTES)

    def wipe(self, slots: Iterable[int]) -> None:
        """Take the bytes out of the file, and new space in their stead."""
        for first, count in _runs(slots):
            start, num_bytes = first * self._slot_bytes, count * self._slot_bytes
            try:
                _fallocate(self._data, _PUNCH_HOLE | _KEEP_SIZE, start, num_bytes)
                os.posix_fallocate(self._data, start, num_bytes)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._overwrite(range(first, first + count))

    def _overwrite(self, slots: range) -> None:
        with mmap.mmap(-1, self._slot_bytes) as zeros:
            for slot in slots:
                os.pwritev(self._data, [zeros], slot * self._slot_bytes)

    def sync(self) -> None:
        """Make durable what has been written; takes as long as the disk takes."""
        os.fdatasync(self._data)
        os.fdatasync(self._records)

    def close(self) -> None:
        """Close the files."""
        os.close(self._data)
        os.close(self._records)


def _fallocate(fd: int, mode: int, offset: int, num_bytes: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).fallocate64
    if call(ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_int64(offset), ctypes.c_int64(num_bytes)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _runs(slots: Iterable[int]) -> Iterator[tuple[int, int]]:
    """First slot and length of each run of consecutive slots."""
    for _, run in groupby(enumerate(sorted(set(slots))), key=lambda pair: pair[1] - pair[0]):
        members = [slot for _, slot in run]
        yield members[0], len(members)
