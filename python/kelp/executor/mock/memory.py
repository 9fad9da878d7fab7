"""The mock's KV pool: real memory that transports register and read, holding one state per token.

Eight bytes per token, so thousands of blocks fit into a megabyte, and every byte can be checked: the content of a block
follows from the tokens up to its end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kelp.core.types import BlockId, KVLayout, num_blocks_for
from kelp.executor.base import PoolMemory
from kelp.executor.mock.language import EMPTY, States, next_states

_STATE_BYTES = 8
_PAGE_BYTES = 4096
_KV_PARTS = 2


def mock_layout(num_blocks: int, block_size: int, dtype: str, model_id: str) -> KVLayout:
    """A pool of one layer and one head, whose K and V of a token take eight bytes together."""
    dtype_bytes = {"float32": 4, "bfloat16": 2}[dtype]
    return KVLayout(
        num_blocks=num_blocks,
        num_layers=1,
        num_kv_heads=1,
        block_size=block_size,
        head_dim=_STATE_BYTES // (_KV_PARTS * dtype_bytes),
        dtype=dtype,
        model_id=model_id,
    )


class KVMemory:
    """States by block and place. One thread writes; whoever owns blocks that nobody writes may check them."""

    def __init__(self, layout: KVLayout) -> None:
        assert layout.pool_bytes == layout.num_blocks * layout.block_size * _STATE_BYTES
        self._block_size = layout.block_size
        # A transport registers whole pages.
        raw = np.zeros(layout.pool_bytes + _PAGE_BYTES, np.uint8)
        skipped = -raw.ctypes.data % _PAGE_BYTES
        self._states: States = raw[skipped : skipped + layout.pool_bytes].view(np.uint64)
        self._cells = self._states.data
        self._blocks = self._states.reshape(layout.num_blocks, layout.block_size)
        self.pool = PoolMemory(self._states.ctypes.data, layout.pool_bytes, "cpu", self._states)

    def state_before(self, block_ids: Sequence[BlockId], position: int) -> int:
        """The state of a sequence up to `position`, exclusive."""
        return self._cells[self._place(block_ids, position - 1)] if position else EMPTY

    def write_one(self, block_ids: Sequence[BlockId], position: int, state: int) -> None:
        """Keep the state of the token at `position`."""
        self._cells[self._place(block_ids, position)] = state

    def write(self, block_ids: Sequence[BlockId], start: int, states: States) -> None:
        """Keep the states of consecutive tokens."""
        size = self._block_size
        first, offset = divmod(start, size)
        num_full = 0 if offset else len(states) // size
        if num_full:
            self._blocks[list(block_ids[first : first + num_full])] = states[: num_full * size].reshape(num_full, size)
            start += num_full * size
            states = states[num_full * size :]
        if len(states):
            self._states[self._places(block_ids, start, start + len(states))] = states

    def find_wrong_block(self, block_ids: Sequence[BlockId], tokens: npt.NDArray[np.int32]) -> int | None:
        """Index of the first block that does not hold the KV of `tokens` `[num_tokens] int32`, None if all do."""
        held = self._states[self._places(block_ids, 0, len(tokens))]
        wrong = np.flatnonzero(held != next_states(EMPTY, tokens, 0))
        return int(wrong[0]) // self._block_size if len(wrong) else None

    def _place(self, block_ids: Sequence[BlockId], position: int) -> int:
        return block_ids[position // self._block_size] * self._block_size + position % self._block_size

    def _places(self, block_ids: Sequence[BlockId], start: int, end: int) -> npt.NDArray[np.int64]:
        size = self._block_size
        first = start // size
        bases = np.array(block_ids[first : num_blocks_for(end, size)], np.int64) * size
        positions = np.arange(start - first * size, end - first * size)
        places: npt.NDArray[np.int64] = bases[positions // size] + positions % size
        return places
