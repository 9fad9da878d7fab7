"""Slots between memory and files by plain system calls on a few threads: where NIXL or O_DIRECT is not to be had.

Also the one who finds out what is wrong with which slot when NIXL says only that a batch failed. A call that the
kernel does not return from is abandoned after its deadline, and what it may still touch is reported as stuck.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kelp.transport.base import FileTransfer, MoveOutcome, Region, SlotFile, StuckSlots

_log = logging.getLogger(__name__)

_NUM_THREADS = 8
"""Requests in flight; with O_DIRECT a single one leaves a disk idle half of the time."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_Call = Callable[[int, Sequence[memoryview], int], int]


def memory_view(address: int, num_bytes: int) -> memoryview:
    """Bytes of this process; the caller sees to it that they stay mapped."""
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")


def move_slot(call: _Call, file: SlotFile, region: Region, memory_slot: int, file_slot: int) -> MoveOutcome:
    """Read (`os.preadv`) or write (`os.pwritev`) one slot, however many calls that takes."""
    view = memory_view(region.base_address + memory_slot * region.stride, file.slot_bytes)
    start, done = file_slot * file.slot_bytes, 0
    try:
        while done < file.slot_bytes:
            count = call(file.fd, [view[done:]], start + done)
            if count == 0:
                return MoveOutcome.SHORT
            done += count
    except OSError as error:
        _log.warning("files: slot %d: %s", file_slot, error)
        return MoveOutcome.NO_SPACE if error.errno in _NO_SPACE else MoveOutcome.FAILED
    return MoveOutcome.MOVED


def check_moves(file: SlotFile, region: Region, moves: Sequence[tuple[int, int]]) -> None:
    """Own invariants of a caller that moves slots."""
    assert region.block_bytes == file.slot_bytes, (region.block_bytes, file.slot_bytes)
    for memory_slot, file_slot in moves:
        assert 0 <= memory_slot < region.num_blocks and 0 <= file_slot < file.num_slots, (memory_slot, file_slot)


def stuck_slots(abandoned: Sequence[tuple[SlotFile, Region, tuple[int, int]]]) -> StuckSlots:
    """What moves that never ended may still touch."""
    return StuckSlots(
        frozenset((region, memory_slot) for _, region, (memory_slot, _) in abandoned),
        frozenset((file.fd, file_slot) for file, _, (_, file_slot) in abandoned),
    )


class _PlainTransfer:
    """See `base.FileTransfer`."""

    def __init__(self, futures: list[Future[MoveOutcome]], abandon: Callable[[int], None]) -> None:
        self._futures = futures
        self._abandon = abandon

    def wait(self, timeout_s: float) -> list[MoveOutcome]:
        """See `base.FileTransfer`."""
        wait(self._futures, timeout_s)
        return [self._outcome(index, future) for index, future in enumerate(self._futures)]

    def _outcome(self, index: int, future: Future[MoveOutcome]) -> MoveOutcome:
        if future.done():
            return future.result()
        if not future.cancel():
            self._abandon(index)
        return MoveOutcome.LATE


class PlainFiles:
    """See `base.FileTransport`."""

    name = "plain files"

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="kelp-files")
        self._owners: list[object] = []
        self._abandoned: list[tuple[Future[MoveOutcome], SlotFile, Region, tuple[int, int]]] = []

    def register(self, region: Region, owner: object) -> None:
        """See `base.FileTransport`."""
        self._owners.append(owner)

    def attach(self, file: SlotFile) -> None:
        """See `base.FileTransport`."""

    def start_read(self, file: SlotFile, region: Region, moves: Sequence[tuple[int, int]]) -> FileTransfer:
        """See `base.FileTransport`."""
        return self._start(os.preadv, file, region, moves)

    def start_write(self, file: SlotFile, region: Region, moves: Sequence[tuple[int, int]]) -> FileTransfer:
        """See `base.FileTransport`."""
        return self._start(os.pwritev, file, region, moves)

    def _start(self, call: _Call, file: SlotFile, region: Region, moves: Sequence[tuple[int, int]]) -> FileTransfer:
        check_moves(file, region, moves)
        futures = [self._threads.submit(move_slot, call, file, region, *move) for move in moves]

        def abandon(index: int) -> None:
            self._abandoned.append((futures[index], file, region, moves[index]))

        return _PlainTransfer(futures, abandon)

    def stuck(self) -> StuckSlots:
        """See `base.FileTransport`."""
        self._abandoned = [entry for entry in self._abandoned if not entry[0].done()]
        return stuck_slots([entry[1:] for entry in self._abandoned])

    def close(self) -> bool:
        """See `base.FileTransport`."""
        is_clean = not self.stuck().memory
        self._threads.shutdown(wait=is_clean, cancel_futures=True)
        if is_clean:
            self._owners.clear()
        else:
            _leaked.append(self)
        return is_clean


_leaked: list[PlainFiles] = []
"""Keeps memory mapped that stuck calls may still write to."""


def deadline_after(timeout_s: float) -> Callable[[], float]:
    """Seconds that are left, never below 0."""
    end_s = time.monotonic() + timeout_s
    return lambda: max(0.0, end_s - time.monotonic())
