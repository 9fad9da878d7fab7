"""Tier G2: blocks in a mapped file (see `base.HostArena`).

A record is written after its block's bytes and cleared before they are reused, so what a killed process leaves is
either whole or found wrong by its checksum. Nothing is written back to a disk: power loss empties the arena, if it lies
on tmpfs.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from kelp.core.config_kv import KvManagerConfig
from kelp.core.errors import ConfigError
from kelp.core.kv_manager_messages import SpaceRecord
from kelp.core.types import SequenceHash
from kelp.kv.tiers.arena_file import PAGE_BYTES, ArenaFile, ArenaShape, claim_arena, is_no_space, round_up
from kelp.kv.tiers.base import BlockRecord
from kelp.kv.tiers.memory import free_memory_bytes
from kelp.kv.tiers.records import RECORD_BYTES, RecordFormat, SlotRecord, checksum, space_digest
from kelp.kv.tiers.touching import Touching
from kelp.transport.base import Region
from kelp.transport.nixl.pinned import pin_host_memory, unpin_host_memory

_log = logging.getLogger(__name__)

_MAX_AUTOMATIC_BYTES = 4 * 1024**3
_NO_RECORD = bytes(RECORD_BYTES)


class FileArena:
    """See `base.HostArena`; made by `open_arena`.

    Attributes:
        path: Of the file, for other processes of this host that map it.
        slots_offset: Where its slots begin in the file.
    """

    def __init__(self, file: ArenaFile, use_huge_pages: bool) -> None:
        shape = file.shape
        assert shape is not None
        self._file, self._shape = file, shape
        mapping = file.map(use_huge_pages)
        file.complete()
        self._bytes = np.frombuffer(mapping, dtype=np.uint8)
        self._format = RecordFormat(shape.space)
        self._is_closed = False
        self.path, self.slots_offset = file.path, shape.slots_offset
        base_address = int(self._bytes.ctypes.data) + shape.slots_offset
        self._region = Region(base_address, shape.num_slots, shape.block_bytes, "cpu", shape.stride_bytes)
        self._is_pinned = pin_host_memory(base_address, self._region.span_bytes)
        self._touching = Touching(base_address, self._region.span_bytes)

    @property
    def region(self) -> Region:
        """See `base.HostArena`."""
        return self._region

    @property
    def owner(self) -> object:
        """See `base.HostArena`."""
        return self._bytes

    @property
    def num_slots(self) -> int:
        """See `base.HostArena`."""
        return self._shape.num_slots

    def view(self, slot: int) -> memoryview:
        """The `block_bytes` bytes of a slot; not to be kept longer than the arena."""
        assert 0 <= slot < self.num_slots and not self._is_closed
        start = self._shape.slots_offset + slot * self._shape.stride_bytes
        return self._bytes.data[start : start + self._shape.block_bytes]

    def checksum(self, slot: int, name: SequenceHash) -> bytes:
        """See `base.HostArena`."""
        return checksum(self.view(slot), name)

    def commit(self, slot: int, record: BlockRecord) -> None:
        """See `base.HostArena`."""
        packed = self._format.pack(slot, SlotRecord(record, self._shape.block_bytes))
        self._record(slot)[:] = np.frombuffer(packed, np.uint8)

    def clear(self, slots: Iterable[int], is_wiped: bool = False) -> None:
        """See `base.HostArena`."""
        for slot in slots:
            self._record(slot)[:] = 0
            if is_wiped:
                np.frombuffer(self.view(slot), np.uint8)[:] = 0

    def recovered(self) -> Iterator[tuple[int, BlockRecord]]:
        """See `base.HostArena`."""
        for slot in range(self.num_slots):
            record = self._format.unpack(slot, self._record(slot).tobytes())
            if record is not None and record.payload_bytes == self._shape.block_bytes:
                yield slot, record.block

    def close(self, is_kept: bool) -> None:
        """See `base.HostArena`; idempotent. Whoever still holds `owner` keeps the mapping, not the file."""
        if self._is_closed:
            return
        self._is_closed = True
        self._touching.stop()
        if self._is_pinned:
            unpin_host_memory(self._region.base_address)
        self._bytes = np.empty(0, dtype=np.uint8)
        if is_kept:
            self._file.release()
        else:
            self._file.remove()

    def _record(self, slot: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        assert 0 <= slot < self.num_slots and not self._is_closed
        start = self._shape.records_offset + slot * RECORD_BYTES
        return self._bytes[start : start + RECORD_BYTES]


def open_arena(config: KvManagerConfig, space: SpaceRecord, block_bytes: int) -> FileArena:
    """The host arena of this manager, with what an earlier manager of the same space left, if it was killed.

    An automatically sized arena that is found is taken as large as it is; one with another `host_bytes` is replaced.

    Raises:
        ConfigError: `kv_manager.host_bytes` is not to be had or holds no block, or `kv_manager.arena_folder` cannot be
            used.
    """
    digest = space_digest(space, block_bytes)
    file = claim_arena(config.arena_folder, digest, block_bytes)
    try:
        found = file.shape
        if found is not None and config.host_bytes // found.stride_bytes in (0, found.num_slots):
            return FileArena(file, config.use_huge_pages)
        file.empty()
        return _create(file, config, ArenaShape(digest, block_bytes, _num_slots(config, block_bytes)))
    except OSError as error:
        file.remove()
        raise ConfigError(f"kv_manager.arena_folder: {config.arena_folder}: {error.strerror}") from None
    except BaseException:
        file.remove()
        raise


def _num_slots(config: KvManagerConfig, block_bytes: int) -> int:
    free = min(free_memory_bytes(), shutil.disk_usage(config.arena_folder).free)
    wanted = config.host_bytes or min(_MAX_AUTOMATIC_BYTES, int(config.host_memory_fraction * free))
    if wanted > free:
        raise ConfigError(f"kv_manager.host_bytes: {wanted} bytes are asked for, {free} are free")
    num_slots = wanted // round_up(block_bytes, PAGE_BYTES)
    if num_slots == 0:
        raise ConfigError(f"kv_manager.host_bytes: {wanted} bytes hold no block of {block_bytes}")
    return num_slots


def _create(file: ArenaFile, config: KvManagerConfig, shape: ArenaShape) -> FileArena:
    while True:
        file.create(shape)
        try:
            return FileArena(file, config.use_huge_pages)
        except OSError as error:
            if not is_no_space(error):
                raise
            if config.host_bytes or shape.num_slots == 1:
                raise ConfigError(
                    f"kv_manager.host_bytes: {shape.file_bytes} bytes do not fit into {config.arena_folder}: "
                    f"{error.strerror}"
                ) from None
        _log.warning("arena: %d bytes do not fit into %s; half of it is tried", shape.file_bytes, config.arena_folder)
        shape = replace(shape, num_slots=shape.num_slots // 2)
