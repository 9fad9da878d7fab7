"""Memory of the disk tier's own, where encrypted blocks lie on their way."""

from __future__ import annotations

import mmap

import numpy as np

from kelp.transport.base import Region, StuckSlots


class Staging:
    """Slots that are taken and given back; those of abandoned transfers come back when they have ended."""

    def __init__(self, slot_bytes: int, num_slots: int) -> None:
        self._bytes = np.frombuffer(mmap.mmap(-1, slot_bytes * num_slots), np.uint8)
        self.region = Region(int(self._bytes.ctypes.data), num_slots, slot_bytes, "cpu")
        self._free = list(range(num_slots))
        self._retired: set[int] = set()

    @property
    def owner(self) -> object:
        """Keeps the memory alive."""
        return self._bytes

    def take(self, count: int) -> list[int] | None:
        """So many slots; None if there are fewer."""
        if len(self._free) < count:
            return None
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give_back(self, slot: int) -> None:
        """Nothing uses it any more."""
        self._free.append(slot)

    def retire(self, slot: int) -> None:
        """An abandoned transfer may still use it."""
        self._retired.add(slot)

    def restore(self, stuck: StuckSlots) -> None:
        """Give back what was retired and is stuck no longer."""
        ended = {slot for slot in self._retired if (self.region, slot) not in stuck.memory}
        self._retired -= ended
        self._free.extend(ended)

    def view(self, slot: int, num_bytes: int) -> memoryview:
        """The first bytes of a slot."""
        start = slot * self.region.block_bytes
        return self._bytes.data[start : start + num_bytes]
