"""Attention over the block-contiguous KV pool `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`.

Seen flat, the pool is a matrix whose row `((block * num_layers + layer) * 2 + k_or_v) * num_kv_heads + head` holds
one head's `block_size * head_dim` numbers. A gather of such rows in (sequence, head, block) order yields K or V as
attention wants it in a single copy, and the same row list serves every layer by adding a constant.

Decode rows are batched, grouped by similar length and padded; the query heads that share a KV head become query
length, which reads K and V once. Prefill chunks run one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from kelp.core.types import BlockId, num_blocks_for
from kelp.executor.torch.attention.base import AttentionShape
from kelp.executor.torch.batch import Chunk

_MIN_GROUP_BLOCKS = 8
"""Sequences up to this long share a group, whatever the padding."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Single-token chunks of similar length.

    Attributes:
        rows: `[num_rows] int64`, their rows in the batch.
        pool_rows: `[num_rows * num_kv_heads * num_blocks] int64`, layer 0, K; padded with block 0.
        mask: `[num_rows, 1, 1, num_blocks * block_size] bool`, True where there is KV.
    """

    rows: torch.Tensor
    pool_rows: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Batch rows `[first_row, end_row)` of one sequence; `pool_rows` and `mask` only if KV precedes them.

    Attributes:
        pool_rows: `[num_kv_heads * num_blocks] int64`, layer 0, K.
        mask: `[end_row - first_row, num_blocks * block_size] bool`.
    """

    first_row: int
    end_row: int
    pool_rows: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's work, equal for all layers; `blocks` and `offsets` `[num_tokens] int64` say where KV goes."""

    blocks: torch.Tensor
    offsets: torch.Tensor
    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[PrefillSpan, ...]


class GatherAttention:
    """See `attention.base.Attention`. Not thread-safe."""

    def __init__(self, pool: torch.Tensor, shape: AttentionShape) -> None:
        """Args: `pool` as the module docstring says, contiguous."""
        self._pool = pool
        self._shape = shape
        _, self._num_layers, _, self._num_kv_heads, self._block_size, self._head_dim = pool.shape
        self._rows = pool.view(-1, self._block_size * self._head_dim)

    def plan(self, chunks: Sequence[Chunk]) -> AttentionPlan:
        """See `Attention`."""
        blocks: list[npt.NDArray[np.int64]] = []
        offsets: list[npt.NDArray[np.int64]] = []
        groups: dict[int, list[tuple[int, Chunk]]] = defaultdict(list)
        prefills: list[PrefillSpan] = []
        row = 0
        for chunk in chunks:
            num_tokens = len(chunk.tokens)
            positions = np.arange(chunk.start, chunk.start + num_tokens)
            blocks.append(np.asarray(chunk.block_ids, np.int64)[positions // self._block_size])
            offsets.append(positions % self._block_size)
            if num_tokens == 1:
                num_blocks = num_blocks_for(chunk.start + 1, self._block_size)
                groups[max(_MIN_GROUP_BLOCKS, num_blocks).bit_length()].append((row, chunk))
            else:
                prefills.append(self._prefill_span(chunk, row))
            row += num_tokens
        return AttentionPlan(
            blocks=self._index(np.concatenate(blocks)),
            offsets=self._index(np.concatenate(offsets)),
            decodes=tuple(self._decode_group(members) for members in groups.values()),
            prefills=tuple(prefills),
        )

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        """See `Attention`."""
        for half, tensor in ((0, key), (1, value)):
            self._pool[:, layer, half].permute(0, 2, 1, 3)[plan.blocks, plan.offsets] = tensor
        out = query.new_empty(query.shape)
        for group in plan.decodes:
            out[group.rows] = self._decode(layer, query[group.rows], group)
        for span in plan.prefills:
            rows = slice(span.first_row, span.end_row)
            out[rows] = self._prefill(layer, query[rows], (key[rows], value[rows]), span)
        return out.flatten(1)

    def _decode(self, layer: int, query: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
        num_rows, num_heads, head_dim = query.shape
        key, value = self._gather(layer, group.pool_rows, num_rows)
        folded = query.reshape(num_rows, self._num_kv_heads, num_heads // self._num_kv_heads, head_dim)
        out = scaled_dot_product_attention(folded, key, value, attn_mask=group.mask, scale=self._shape.scale)
        return out.reshape(num_rows, num_heads, head_dim)

    def _prefill(
        self, layer: int, query: torch.Tensor, own: tuple[torch.Tensor, torch.Tensor], span: PrefillSpan
    ) -> torch.Tensor:
        if span.pool_rows is None:
            key, value = (part.transpose(0, 1)[None] for part in own)
        else:
            key, value = self._gather(layer, span.pool_rows, 1)
        out = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key,
            value,
            attn_mask=span.mask,
            is_causal=span.mask is None,
            scale=self._shape.scale,
            enable_gqa=query.shape[1] != self._num_kv_heads,
        )
        return out[0].transpose(0, 1)

    def _gather(self, layer: int, pool_rows: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[num_rows, num_kv_heads, num_blocks * block_size, head_dim]`."""
        shape = (num_rows, self._num_kv_heads, -1, self._head_dim)
        first = layer * 2 * self._num_kv_heads
        key = self._rows.index_select(0, pool_rows + first)
        value = self._rows.index_select(0, pool_rows + (first + self._num_kv_heads))
        return key.view(shape), value.view(shape)

    def _decode_group(self, members: list[tuple[int, Chunk]]) -> DecodeGroup:
        lengths = np.asarray([chunk.start + 1 for _, chunk in members])
        num_blocks = num_blocks_for(int(lengths.max()), self._block_size)
        table = np.zeros((len(members), num_blocks), np.int64)
        for line, (_, chunk) in zip(table, members, strict=True):
            used = num_blocks_for(chunk.start + 1, self._block_size)
            line[:used] = chunk.block_ids[:used]
        mask = np.arange(num_blocks * self._block_size)[None, :] < lengths[:, None]
        return DecodeGroup(
            rows=self._index(np.asarray([row for row, _ in members])),
            pool_rows=self._pool_rows(table),
            mask=torch.from_numpy(mask[:, None, None, :]).to(self._pool.device),
        )

    def _prefill_span(self, chunk: Chunk, row: int) -> PrefillSpan:
        num_tokens = len(chunk.tokens)
        if chunk.start == 0:
            return PrefillSpan(row, row + num_tokens, None, None)
        end = chunk.start + num_tokens
        used: list[BlockId] = list(chunk.block_ids[: num_blocks_for(end, self._block_size)])
        limits = np.arange(chunk.start, end)[:, None]
        mask = np.arange(len(used) * self._block_size)[None, :] <= limits
        return PrefillSpan(
            first_row=row,
            end_row=row + num_tokens,
            pool_rows=self._pool_rows(np.asarray([used], np.int64)),
            mask=torch.from_numpy(mask).to(self._pool.device),
        )

    def _pool_rows(self, table: npt.NDArray[np.int64]) -> torch.Tensor:
        """Rows of the flat pool for a block table `[num_rows, num_blocks]`, in (row, head, block) order."""
        heads = np.arange(self._num_kv_heads)
        first = table * (self._num_layers * 2 * self._num_kv_heads)
        return self._index((first[:, None, :] + heads[None, :, None]).ravel())

    def _index(self, array: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self._pool.device)
