"""Attention that first copies the KV it reads: runs on any device, in any dtype.

Seen flat, the pool `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]` is a matrix whose row
`((block * num_layers + layer) * 2 + k_or_v) * num_kv_heads + head` holds one head's `block_size * head_dim` numbers.
A gather of such rows in (K or V, sequence, head, block) order yields both as attention wants them in a single copy.
Row numbers are those of layer 0; another layer reads the same rows of a view that starts later.

Chunks of a few tokens (decoding, drafts) are batched, grouped by similar length and padded; the query heads that
share a KV head become query rows, which reads K and V once. Longer chunks run one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from kelp.core.types import num_blocks_for
from kelp.executor.batching.batch import Chunk
from kelp.executor.torch.attention.base import AttentionShape
from kelp.executor.torch.attention.dense import attend_group, attend_span

_MIN_GROUP_BLOCKS = 8
"""Sequences up to this long share a group, whatever the padding."""

_MAX_GROUP_TOKENS = 16
"""Longer chunks are worth attending alone."""


@dataclass(frozen=True, slots=True)
class Group:
    """Chunks of equally many tokens and similar length.

    Attributes:
        rows: `[num_chunks * num_tokens] int64`, their rows in the batch; None if they are the whole batch in order.
        num_chunks: How many there are.
        pool_rows: `[2 * num_chunks * num_kv_heads * num_blocks] int64`, layer 0; padded with block 0.
        num_positions: Length of the longest chunk's sequence; what is gathered beyond it is cut off.
        masks: By window, what to add to scores: `[num_chunks, 1, num_tokens, 1, num_positions]` fp32, or None if all
            is seen.
    """

    rows: torch.Tensor | None
    num_chunks: int
    pool_rows: torch.Tensor
    num_positions: int
    masks: dict[int | None, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Span:
    """Batch rows `[first_row, end_row)` of one sequence, of which `num_positions` are known by then.

    Attributes:
        pool_rows: `[2 * num_kv_heads * num_blocks] int64`, layer 0.
    """

    first_row: int
    end_row: int
    pool_rows: torch.Tensor
    num_positions: int


@dataclass(frozen=True, slots=True)
class GatherPlan:
    """One step's work, equal for all layers.

    Attributes:
        token_rows: `[num_tokens * 2 * num_kv_heads] int64`, rows of `head_dim` numbers that new KV goes to, layer 0.
    """

    token_rows: torch.Tensor
    groups: tuple[Group, ...]
    spans: tuple[Span, ...]


class GatherAttention:
    """See `attention.base.Attention`. Not thread-safe."""

    def __init__(self, pool: torch.Tensor, shape: AttentionShape) -> None:
        """Args: `pool` as the module docstring says, contiguous."""
        _, self._num_layers, _, self._num_kv_heads, self._block_size, self._head_dim = pool.shape
        self._shape = shape
        self._device = pool.device
        heads = 2 * self._num_kv_heads
        rows = pool.view(-1, self._block_size * self._head_dim)
        tokens = pool.view(-1, self._head_dim)
        self._rows = [rows[layer * heads :] for layer in range(self._num_layers)]
        self._tokens = [tokens[layer * heads * self._block_size :] for layer in range(self._num_layers)]

    def plan(self, chunks: Sequence[Chunk]) -> GatherPlan:
        """See `Attention`."""
        starts = accumulate((len(chunk.tokens) for chunk in chunks), initial=0)
        return self.plan_of(chunks, list(zip(starts, chunks, strict=False)))

    def plan_of(self, chunks: Sequence[Chunk], placed: Sequence[tuple[int, Chunk]]) -> GatherPlan:
        """A plan that stores the KV of all chunks, and attends those in `placed`, each with its first row."""
        num_rows = sum(len(chunk.tokens) for chunk in chunks)
        members: dict[tuple[int, int], list[tuple[int, Chunk]]] = defaultdict(list)
        spans: list[Span] = []
        for row, chunk in placed:
            num_tokens = len(chunk.tokens)
            if num_tokens <= _MAX_GROUP_TOKENS:
                num_blocks = num_blocks_for(chunk.start + num_tokens, self._block_size)
                members[num_tokens, max(_MIN_GROUP_BLOCKS, num_blocks).bit_length()].append((row, chunk))
            else:
                spans.append(self._span(chunk, row))
        return GatherPlan(
            token_rows=self._token_rows(chunks),
            groups=tuple(self._group(group, num_rows) for group in members.values()),
            spans=tuple(spans),
        )

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: GatherPlan
    ) -> torch.Tensor:
        """See `Attention`."""
        self.store(layer, key, value, plan)
        if len(plan.groups) == 1 and plan.groups[0].rows is None:
            return self._attend_group(layer, query, plan.groups[0])
        out = query.new_empty(len(query), query.shape[1] * query.shape[2])
        self.attend_stored(layer, query, plan, out)
        return out

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor, plan: GatherPlan) -> None:
        """The first half of `attend`."""
        new = torch.cat((key, value), dim=1).view(-1, self._head_dim)
        self._tokens[layer].index_copy_(0, plan.token_rows, new)

    def attend_stored(self, layer: int, query: torch.Tensor, plan: GatherPlan, out: torch.Tensor) -> None:
        """The second half of `attend`: writes the planned rows of `out` `[num_tokens, num_heads * head_dim]`."""
        for group in plan.groups:
            out[group.rows] = self._attend_group(layer, query[group.rows], group)
        for span in plan.spans:
            rows = slice(span.first_row, span.end_row)
            out[rows] = self._attend_span(layer, query[rows], span).flatten(1)

    def _attend_group(self, layer: int, query: torch.Tensor, group: Group) -> torch.Tensor:
        """`[num_chunks * num_tokens, num_heads * head_dim]`."""
        num_chunks, num_heads = group.num_chunks, query.shape[1]
        key, value = self._gather(layer, group.pool_rows, num_chunks, group.num_positions)
        share = num_heads // self._num_kv_heads
        by_head = query.view(num_chunks, -1, self._num_kv_heads, share, self._head_dim).transpose(1, 2)
        mask = group.masks[self._shape.windows[layer]]
        if mask is not None and by_head.shape[2] > 1:
            mask = mask.expand(-1, -1, -1, share, -1).flatten(2, 3)
        elif mask is not None:
            mask = mask[:, :, 0]
        out = attend_group(by_head.flatten(2, 3), key, value, mask, self._shape.scale)
        return out.view(by_head.shape).transpose(1, 2).reshape(len(query), -1)

    def _attend_span(self, layer: int, query: torch.Tensor, span: Span) -> torch.Tensor:
        key, value = self._gather(layer, span.pool_rows, 1, span.num_positions)
        return attend_span(query, key[0], value[0], self._shape.scale, self._shape.windows[layer])

    def _gather(
        self, layer: int, pool_rows: torch.Tensor, num_chunks: int, num_positions: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each `[num_chunks, num_kv_heads, num_positions, head_dim]`."""
        gathered = self._rows[layer].index_select(0, pool_rows)
        halves = gathered.view(2, num_chunks, self._num_kv_heads, -1, self._head_dim)[..., :num_positions, :]
        return halves[0], halves[1]

    def _group(self, members: list[tuple[int, Chunk]], num_batch_rows: int) -> Group:
        num_tokens = len(members[0][1].tokens)
        ends = np.asarray([chunk.start + num_tokens for _, chunk in members])
        num_blocks = num_blocks_for(int(ends.max()), self._block_size)
        table = np.zeros((len(members), num_blocks), np.int64)
        for line, (_, chunk) in zip(table, members, strict=True):
            used = num_blocks_for(chunk.start + num_tokens, self._block_size)
            line[:used] = chunk.block_ids[:used]
        num_positions = int(ends.max())
        is_whole_batch = len(members) * num_tokens == num_batch_rows
        first_rows = np.asarray([row for row, _ in members])
        limits = ends[:, None] - num_tokens + np.arange(num_tokens)[None, :]
        return Group(
            rows=None if is_whole_batch else self._index((first_rows[:, None] + np.arange(num_tokens)).ravel()),
            num_chunks=len(members),
            pool_rows=self._pool_rows(table),
            num_positions=num_positions,
            masks={window: self._mask(limits, num_positions, window) for window in set(self._shape.windows)},
        )

    def _mask(self, limits: npt.NDArray[np.int64], num_positions: int, window: int | None) -> torch.Tensor | None:
        """`limits` `[num_chunks, num_tokens]`: the last position that each row sees."""
        positions = np.arange(num_positions)
        hidden = positions > limits[..., None]
        if window is not None:
            hidden |= positions <= limits[..., None] - window
        if not hidden.any():
            return None
        mask = np.where(hidden, np.float32(-np.inf), np.float32(0))
        return torch.from_numpy(mask[:, None, :, None, :]).to(self._device)

    def _span(self, chunk: Chunk, row: int) -> Span:
        end = chunk.start + len(chunk.tokens)
        used = chunk.block_ids[: num_blocks_for(end, self._block_size)]
        return Span(row, row + len(chunk.tokens), self._pool_rows(np.asarray([used], np.int64)), end)

    def _pool_rows(self, table: npt.NDArray[np.int64]) -> torch.Tensor:
        """Rows of the flat pool for a block table `[num_chunks, num_blocks]`, in (half, chunk, head, block) order."""
        heads = np.arange(2 * self._num_kv_heads).reshape(2, 1, self._num_kv_heads, 1)
        first = table * (self._num_layers * 2 * self._num_kv_heads)
        return self._index((first[None, :, None, :] + heads).ravel())

    def _token_rows(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Where K and V of each token go, in (token, half, head) order."""
        block_tokens = self._num_layers * 2 * self._num_kv_heads * self._block_size
        places: list[npt.NDArray[np.int64] | int] = []
        for chunk in chunks:
            if len(chunk.tokens) == 1:
                block, offset = divmod(chunk.start, self._block_size)
                places.append(chunk.block_ids[block] * block_tokens + offset)
                continue
            positions = np.arange(chunk.start, chunk.start + len(chunk.tokens))
            blocks = np.asarray(chunk.block_ids, np.int64)[positions // self._block_size]
            places.append(blocks * block_tokens + positions % self._block_size)
        heads = np.arange(2 * self._num_kv_heads) * self._block_size
        return self._index((np.hstack(places)[:, None] + heads[None, :]).ravel())

    def _index(self, array: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self._device)
