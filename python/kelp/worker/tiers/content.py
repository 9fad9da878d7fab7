"""Whether what lies in a worker's own blocks is what the manager said it gave."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from kelp.core.kv_manager_values import SlotRef
from kelp.core.types import BlockId, KVLayout, SequenceHash
from kelp.executor.base import PoolMemory
from kelp.kv.tiers.records import checksum


class PoolContent:
    """Reads blocks that nobody writes; any thread.

    A pool on an accelerator cannot be read from here: everything counts as right there.
    """

    def __init__(self, layout: KVLayout, memory: PoolMemory) -> None:
        self._block_bytes = layout.block_bytes
        self._memory = memory
        self._is_readable = memory.device == "cpu"

    def num_right(
        self, names: Sequence[SequenceHash], references: Sequence[SlotRef], block_ids: Sequence[BlockId]
    ) -> int:
        """How many leading blocks have the checksum of their reference; the lists are of one length."""
        if not self._is_readable:
            return len(block_ids)
        for index, (name, reference, block_id) in enumerate(zip(names, references, block_ids, strict=True)):
            if checksum(self._bytes(block_id), name) != reference.checksum:
                return index
        return len(block_ids)

    def _bytes(self, block_id: BlockId) -> memoryview:
        address = self._memory.base_address + block_id * self._block_bytes
        return memoryview((ctypes.c_char * self._block_bytes).from_address(address)).cast("B")
