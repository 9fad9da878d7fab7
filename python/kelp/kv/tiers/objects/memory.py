"""Memory of the object-store process: the mapped arena, and lanes that objects are put together in.

An object is one piece of memory to NIXL, its blocks lie all over the arena: they are copied, and nothing but that copy
ever touches the arena. So no request in flight, however late, writes into slots that are somebody else's by then.
"""

from __future__ import annotations

import mmap
import os

import numpy as np

from kelp.core.errors import ConfigError
from kelp.kv.tiers.objects.messages import ArenaMap


class ArenaView:
    """Slots of the arena.

    Raises:
        ConfigError: The file is not there or too short.
    """

    def __init__(self, arena: ArenaMap) -> None:
        self._arena = arena
        num_bytes = arena.offset_bytes + (arena.num_slots - 1) * arena.stride_bytes + arena.block_bytes
        try:
            descriptor = os.open(arena.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._memory = memoryview(mmap.mmap(descriptor, num_bytes))
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            raise ConfigError(f"kv_manager.arena_folder: {arena.path}: {error}") from error

    def slot(self, slot: int) -> memoryview:
        """The bytes of a slot."""
        assert 0 <= slot < self._arena.num_slots
        start = self._arena.offset_bytes + slot * self._arena.stride_bytes
        return self._memory[start : start + self._arena.block_bytes]


class Lanes:
    """Equal pieces of memory, each for one object at a time.

    Attributes:
        address: Of the first; all lie side by side.
    """

    def __init__(self, num_lanes: int, lane_bytes: int) -> None:
        self._lane_bytes = lane_bytes
        self.num_bytes = num_lanes * lane_bytes
        self._memory = memoryview(mmap.mmap(-1, self.num_bytes))
        self.address = int(np.frombuffer(self._memory, dtype=np.uint8).ctypes.data)

    def lane(self, index: int) -> memoryview:
        """The bytes of a lane."""
        return self._memory[index * self._lane_bytes : (index + 1) * self._lane_bytes]

    def lane_address(self, index: int) -> int:
        """Where they are."""
        return self.address + index * self._lane_bytes
