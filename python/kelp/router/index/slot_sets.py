"""Bit masks of slots as arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ENTRY_BYTES = 300


class SlotSets:
    """Arrays of the masks asked for lately: prompts that share a prefix end at the same sets of workers.

    Args:
        max_bytes: All arrays are forgotten beyond this.
    """

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._arrays: dict[int, npt.NDArray[np.intp]] = {}

    def __getitem__(self, mask: int) -> npt.NDArray[np.intp]:
        """`[num_slots] intp`, ascending and read-only."""
        array = self._arrays.get(mask)
        return self._make(mask) if array is None else array

    def clear(self) -> None:
        """Forget the arrays."""
        self._arrays.clear()
        self.num_bytes = 0

    def _make(self, mask: int) -> npt.NDArray[np.intp]:
        raw = np.frombuffer(mask.to_bytes(mask.bit_length() // 8 + 1, "little"), np.uint8)
        array = np.unpackbits(raw, bitorder="little").nonzero()[0]
        array.setflags(write=False)
        num_bytes = _ENTRY_BYTES + mask.bit_length() // 7 + array.nbytes
        if self.num_bytes + num_bytes > self._max_bytes:
            self.clear()
        self._arrays[mask] = array
        self.num_bytes += num_bytes
        return array
