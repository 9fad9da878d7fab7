"""Attention of decoding tokens by a compiled kernel that reads KV where it lies; prompts go the way of the gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from kelp.core.types import num_blocks_for
from kelp.executor.batching.batch import Chunk
from kelp.executor.torch.attention.base import AttentionShape
from kelp.executor.torch.attention.gather import GatherAttention, GatherPlan
from kelp.executor.torch.native.kernels import (
    MAX_GROUP,
    MAX_HEAD_DIM,
    PoolShape,
    PreparedRows,
    RowTables,
    kernels_for,
)

_MAX_CHUNK_TOKENS = 16
"""Longer chunks make use of each key that they read often enough for matrix products."""


@dataclass(frozen=True, slots=True)
class NativePlan:
    """One step's work.

    Attributes:
        rows: `[num_rows] int64`, rows of the batch that the kernel attends; None if all.
        prepared: What they see; None if there are none.
        rest: Where new KV goes, and the chunks that are left to the gather.
    """

    rows: torch.Tensor | None
    prepared: PreparedRows | None
    rest: GatherPlan


class NativeAttention:
    """See `attention.base.Attention`. Not thread-safe."""

    def __init__(self, pool: torch.Tensor, shape: AttentionShape) -> None:
        """Args: as `GatherAttention`; `why_not_native` must have had no objection."""
        kernels = kernels_for(pool)
        assert kernels is not None
        self._kernels = kernels
        self._shape = PoolShape(pool, shape.num_heads, shape.scale)
        self._windows = shape.windows
        self._block_size = pool.shape[4]
        self._gather = GatherAttention(pool, shape)

    def plan(self, chunks: Sequence[Chunk]) -> NativePlan:
        """See `Attention`."""
        starts = accumulate((len(chunk.tokens) for chunk in chunks), initial=0)
        placed = list(zip(starts, chunks, strict=False))
        short = [place for place in placed if len(place[1].tokens) <= _MAX_CHUNK_TOKENS]
        rest = self._gather.plan_of(chunks, [place for place in placed if len(place[1].tokens) > _MAX_CHUNK_TOKENS])
        if not short:
            return NativePlan(None, None, rest)
        rows = None
        if len(short) < len(chunks):
            parts = [np.arange(row, row + len(chunk.tokens)) for row, chunk in short]
            rows = torch.from_numpy(np.concatenate(parts))
        return NativePlan(rows, PreparedRows(self._tables([chunk for _, chunk in short]), self._shape), rest)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: NativePlan
    ) -> torch.Tensor:
        """See `Attention`."""
        self._gather.store(layer, key, value, plan.rest)
        if plan.prepared is not None and plan.rows is None:
            return self._kernels.attend(self._shape, plan.prepared, layer, self._windows[layer], query)
        out = query.new_empty(len(query), query.shape[1] * query.shape[2])
        if plan.prepared is not None:
            rows = query[plan.rows]
            out[plan.rows] = self._kernels.attend(self._shape, plan.prepared, layer, self._windows[layer], rows)
        self._gather.attend_stored(layer, query, plan.rest, out)
        return out

    def _tables(self, chunks: Sequence[Chunk]) -> RowTables:
        lengths = np.asarray([len(chunk.tokens) for chunk in chunks])
        ends = [np.arange(chunk.start + 1, chunk.start + len(chunk.tokens) + 1) for chunk in chunks]
        used = [num_blocks_for(int(end[-1]), self._block_size) for end in ends]
        tables = np.zeros((len(chunks), max(used)), np.int64)
        for line, chunk, num_blocks in zip(tables, chunks, used, strict=True):
            line[:num_blocks] = chunk.block_ids[:num_blocks]
        row_table = np.repeat(np.arange(len(chunks)), lengths)
        return RowTables(*(torch.from_numpy(array) for array in (tables, row_table, np.concatenate(ends))))


def why_not_native(pool: torch.Tensor, shape: AttentionShape) -> str | None:
    """Why the kernel cannot serve this pool, or None if it can."""
    if pool.device.type != "cpu" or pool.dtype != torch.bfloat16:
        return f"it is for bfloat16 on a CPU, the pool is {pool.dtype} on {pool.device}"
    head_dim, share = pool.shape[5], shape.num_heads // pool.shape[3]
    if head_dim > MAX_HEAD_DIM or share > MAX_GROUP:
        return f"head_dim {head_dim} or {share} query heads per KV head exceed {MAX_HEAD_DIM} and {MAX_GROUP}"
    return None if kernels_for(pool) is not None else "the kernels could not be compiled; see the log"
