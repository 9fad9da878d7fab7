"""What backends with block tables share: how a step is laid out for them, and what makes them fit for a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from kelp.core.types import num_blocks_for
from kelp.executor.batching.batch import Chunk
from kelp.executor.torch.attention.base import Attention


@runtime_checkable
class RowAttention(Attention, Protocol):
    """An `Attention` whose decoding steps can be captured in a graph: in them, the host needs nothing of the device."""

    def plan_rows(self, positions: torch.Tensor, tables: torch.Tensor) -> Any:
        """A plan for a batch of one token per sequence, by device work alone.

        Args:
            positions: `[num_rows] int64`, place of each token in its sequence.
            tables: `[num_rows, max_blocks] int32`, last dimension dense; entries beyond a row's length are not read.
        """


def token_places(chunks: Sequence[Chunk], block_size: int) -> npt.NDArray[np.int64]:
    """`[num_tokens, 2]`: block of each token of a step, and its position in the block."""
    places = []
    for chunk in chunks:
        positions = np.arange(chunk.start, chunk.start + len(chunk.tokens))
        blocks = np.asarray(chunk.block_ids, np.int64)[positions // block_size]
        places.append(np.stack((blocks, positions % block_size), axis=1))
    return np.concatenate(places)


def block_tables(chunks: Sequence[Chunk], block_size: int) -> npt.NDArray[np.int32]:
    """`[num_chunks, max_blocks]`: blocks that hold KV at the end of the step, padded with block 0."""
    used = [num_blocks_for(chunk.start + len(chunk.tokens), block_size) for chunk in chunks]
    tables = np.zeros((len(chunks), max(used)), np.int32)
    for line, chunk, num_blocks in zip(tables, chunks, used, strict=True):
        line[:num_blocks] = chunk.block_ids[:num_blocks]
    return tables
