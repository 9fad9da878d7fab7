"""Paged attention through our own kernels: the whole batch in two launches per layer, whatever it mixes.

Decoding tokens, and the few tokens of a chunk that verifies drafts, become tiles of one token whose KV is split among
programs; longer chunks become tiles of many tokens. All places, tables and tiles of a step travel to the device in
one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kelp.core.types import num_blocks_for
from kelp.executor.batching.batch import Chunk
from kelp.executor.torch.attention import split_kv_kernel as kernels
from kelp.executor.torch.attention.base import AttentionShape
from kelp.executor.torch.attention.paged import block_tables, token_places
from kelp.executor.torch.staging import stage_int32

IS_COMPILED = kernels.IS_COMPILED
"""See `split_kv_kernel`."""

_MAX_SINGLES = 4
"""Chunks up to this many tokens run token by token: they are too short to fill a tile, and splits help them more."""

_MIN_SPLIT_TOKENS = 128
_MAX_SPLITS = 64
_PROGRAMS_PER_PROCESSOR = 2
_PROCESSORS_WITHOUT_DEVICE = 8
"""In interpreter mode, where it only decides what gets tested."""


@dataclass(frozen=True, slots=True)
class TilePlan:
    """One step's work, equal for all layers; shapes as `split_kv_kernel` takes them.

    Attributes:
        singles: Tiles of one token; may be empty.
        spans: Tiles of up to `tokens_per_tile`; may be empty.
        num_splits: Of `singles`.
    """

    places: torch.Tensor
    tables: torch.Tensor
    singles: torch.Tensor
    spans: torch.Tensor
    num_splits: int


class SplitKVAttention:
    """See `attention.base.Attention` and `attention.paged.RowAttention`. Not thread-safe."""

    def __init__(self, pool: torch.Tensor, shape: AttentionShape) -> None:
        """Args: `pool` as `attention.base` says, contiguous."""
        self._pool = pool
        self._shape = shape
        self._num_kv_heads, self._block_size = pool.shape[3], pool.shape[4]
        self._tokens_per_tile = kernels.tokens_per_tile(shape.num_heads, self._num_kv_heads)
        self._num_processors = _PROCESSORS_WITHOUT_DEVICE
        if pool.is_cuda:
            self._num_processors = torch.cuda.get_device_properties(pool.device).multi_processor_count

    def plan(self, chunks: Sequence[Chunk]) -> TilePlan:
        """See `Attention`."""
        singles: list[tuple[int, int, int, int]] = []
        spans: list[tuple[int, int, int, int]] = []
        row = 0
        for line, chunk in enumerate(chunks):
            num_tokens = len(chunk.tokens)
            step = 1 if num_tokens <= _MAX_SINGLES else self._tokens_per_tile
            tiles = singles if num_tokens <= _MAX_SINGLES else spans
            for first in range(0, num_tokens, step):
                tiles.append((row + first, min(step, num_tokens - first), chunk.start + first, line))
            row += num_tokens
        tables = block_tables(chunks, self._block_size)
        arrays = (token_places(chunks, self._block_size), tables, _tiles(singles), _tiles(spans))
        places, device_tables, device_singles, device_spans = stage_int32(arrays, self._pool.device)
        num_splits = self._num_splits(len(singles), tables.shape[1])
        return TilePlan(places, device_tables, device_singles, device_spans, num_splits)

    def plan_rows(self, positions: torch.Tensor, tables: torch.Tensor) -> TilePlan:
        """See `RowAttention`."""
        rows = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
        blocks = tables.gather(1, (positions // self._block_size)[:, None])[:, 0]
        at = positions.int()
        return TilePlan(
            places=torch.stack((blocks, at % self._block_size), dim=1),
            tables=tables,
            singles=torch.stack((rows, torch.ones_like(rows), at, rows), dim=1),
            spans=rows.new_empty(0, 4),
            num_splits=self._num_splits(len(positions), tables.shape[1]),
        )

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: TilePlan
    ) -> torch.Tensor:
        """See `Attention`."""
        query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
        layer_pool = self._pool[:, layer]
        kernels.write_rows(key, value, layer_pool, plan.places)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        scale, window = self._shape.scale, self._shape.windows[layer]
        if len(plan.singles):
            shape = kernels.TileShape(scale, window, 1, plan.num_splits)
            kernels.attend_tiles(query, layer_pool, plan.tables, plan.singles, shape, out)
        if len(plan.spans):
            shape = kernels.TileShape(scale, window, self._tokens_per_tile, 1)
            kernels.attend_tiles(query, layer_pool, plan.tables, plan.spans, shape, out)
        return out.flatten(1)

    def _num_splits(self, num_tiles: int, max_blocks: int) -> int:
        """As many programs as keep the device busy, none so small that merging outweighs it; a power of two."""
        programs = max(1, num_tiles * self._num_kv_heads)
        wanted = num_blocks_for(_PROGRAMS_PER_PROCESSOR * self._num_processors, programs)
        useful = max(1, max_blocks * self._block_size // _MIN_SPLIT_TOKENS)
        limit = min(wanted, useful, _MAX_SPLITS)
        return 1 << (limit.bit_length() - 1)


def _tiles(rows: list[tuple[int, int, int, int]]) -> npt.NDArray[np.int32]:
    return np.asarray(rows, np.int32).reshape(-1, 4)
