"""Triton-language kernels over the block-contiguous KV pool; the only importer of the compiler `triton`.

Decode is bound by reading KV, so the work is cut along it: one program reads one split of one sequence's one KV head,
once, for all query heads that share it, and a second pass merges the splits by their log-sum-exps. Prefill runs the
same kernel with many tokens of a sequence in one tile and no splits. Products and sums are fp32; exponentials are to
base 2, which is what the hardware has.

Knows tensors and strides only; who calls when is `split_kv`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

_LOG2_E = 1.4426950408889634

_MIN_DOT = 16
"""`tl.dot` takes no dimension below this."""

_QUERY_ROWS = 64
"""Heads times tokens in a tile of several tokens."""

_KV_TILE_BYTES = 64 * 256
"""Of K per iteration at most, and 64 positions at most; more would not fit into the shared memory of small GPUs."""

_OPTIONS: dict[str, Any] = {"num_stages": 2, "enable_fp_fusion": True}
"""Fusion is said outright, since its default differs between versions of the compiler."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _attend_tiles(  # type: ignore[no-untyped-def]
    query,
    pool,
    tables,
    tiles,
    out,
    log_sums,
    value_distance,
    block_stride,
    table_stride,
    query_row_stride,
    query_head_stride,
    scale,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    KV_TILE: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_heads = tl.num_programs(1) * GROUP
    batch_row = tl.load(tiles + tile * 4).to(tl.int64)
    num_tokens = tl.load(tiles + tile * 4 + 1)
    position = tl.load(tiles + tile * 4 + 2)
    table = tables + tl.load(tiles + tile * 4 + 3).to(tl.int64) * table_stride

    length = position + num_tokens
    first_seen = 0
    if WINDOW > 0:
        first_seen = tl.maximum(position + 1 - WINDOW, 0)
    num_kv_tiles = (length - first_seen + KV_TILE - 1) // KV_TILE
    split_tokens = (num_kv_tiles + NUM_SPLITS - 1) // NUM_SPLITS * KV_TILE
    begin = first_seen + split * split_tokens
    end = tl.minimum(begin + split_tokens, length)

    rows = tl.arange(0, QUERY_ROWS)
    tokens = rows // GROUP_PADDED
    members = rows % GROUP_PADDED
    heads = kv_head * GROUP + members
    dims = tl.arange(0, HEAD_DIM_PADDED)
    is_row = (members < GROUP) & (tokens < num_tokens)
    is_dim = dims < HEAD_DIM
    query_at = (batch_row + tokens) * query_row_stride + heads * query_head_stride
    q = tl.load(query + query_at[:, None] + dims[None, :], mask=is_row[:, None] & is_dim[None, :], other=0.0)
    last_seen = position + tokens

    # Heads of a block follow each other, each `[block_size, head_dim]`.
    keys = pool + kv_head * (BLOCK_SIZE * HEAD_DIM)
    highest = tl.full([QUERY_ROWS], float("-inf"), tl.float32)
    total = tl.full([QUERY_ROWS], 0.0, tl.float32)
    weighted = tl.full([QUERY_ROWS, HEAD_DIM_PADDED], 0.0, tl.float32)
    for start in range(begin, end, KV_TILE):
        positions = start + tl.arange(0, KV_TILE)
        is_known = positions < end
        block = tl.load(table + positions // BLOCK_SIZE, mask=is_known, other=0).to(tl.int64)
        places = block * block_stride + (positions % BLOCK_SIZE) * HEAD_DIM
        k = tl.load(keys + places[None, :] + dims[:, None], mask=is_known[None, :] & is_dim[:, None], other=0.0)
        is_seen = is_known[None, :] & (positions[None, :] <= last_seen[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (positions[None, :] > last_seen[:, None] - WINDOW)
        scores = tl.where(is_seen, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        highest_now = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen nothing yet must not subtract infinity from infinity.
        base = tl.where(highest_now == float("-inf"), 0.0, highest_now)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        v = tl.load(
            keys + value_distance + places[:, None] + dims[None, :],
            mask=is_known[:, None] & is_dim[None, :],
            other=0.0,
        )
        weighted = weighted * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        highest = highest_now

    # A split that has seen nothing gets weight 0 in the merge.
    divisor = tl.where(total > 0.0, total, 1.0)
    result = weighted / divisor[:, None]
    if NUM_SPLITS > 1:
        target = (tile * num_heads + heads) * NUM_SPLITS + split
        tl.store(log_sums + target, tl.where(total > 0.0, highest + tl.log2(divisor), float("-inf")), mask=is_row)
    else:
        target = (batch_row + tokens) * num_heads + heads
    tl.store(
        out + target[:, None] * HEAD_DIM + dims[None, :],
        result.to(out.dtype.element_ty),
        mask=is_row[:, None] & is_dim[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _merge_splits(  # type: ignore[no-untyped-def]
    partial, log_sums, tiles, out, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, NUM_SPLITS: tl.constexpr
):
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    batch_row = tl.load(tiles + tile * 4).to(tl.int64)
    splits = tl.arange(0, NUM_SPLITS)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    is_dim = dims < HEAD_DIM
    sources = (tile * num_heads + head) * NUM_SPLITS + splits
    log_sum = tl.load(log_sums + sources)
    weights = tl.exp2(log_sum - tl.max(log_sum, 0))
    parts = tl.load(partial + sources[:, None] * HEAD_DIM + dims[None, :], mask=is_dim[None, :], other=0.0)
    merged = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + (batch_row * num_heads + head) * HEAD_DIM + dims, merged.to(out.dtype.element_ty), mask=is_dim)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _write_rows(  # type: ignore[no-untyped-def]
    key,
    value,
    pool,
    places,
    value_distance,
    block_stride,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    is_dim = dims < HEAD_DIM
    block = tl.load(places + row * 2).to(tl.int64)
    offset = tl.load(places + row * 2 + 1)
    target = pool + block * block_stride + (head * BLOCK_SIZE + offset) * HEAD_DIM + dims
    k = tl.load(key + row * key_row_stride + head * key_head_stride + dims, mask=is_dim)
    v = tl.load(value + row * value_row_stride + head * value_head_stride + dims, mask=is_dim)
    tl.store(target, k, mask=is_dim)
    tl.store(target + value_distance, v, mask=is_dim)


IS_COMPILED = isinstance(_attend_tiles, triton.JITFunction)
"""False where TRITON_INTERPRET=1 was set before the first import of triton: then they run on host tensors."""


@dataclass(frozen=True, slots=True)
class TileShape:
    """How one launch cuts its work.

    Attributes:
        window: Latest positions that a token sees, itself included; None sees all.
        max_tokens: Tokens of a tile at most; see `tokens_per_tile`.
        num_splits: Programs that share the KV of a tile, a power of two; 1 where `max_tokens` is above 1.
    """

    scale: float
    window: int | None
    max_tokens: int
    num_splits: int


def tokens_per_tile(num_heads: int, num_kv_heads: int) -> int:
    """Tokens that a tile of several should hold."""
    return max(1, _QUERY_ROWS // int(triton.next_power_of_2(num_heads // num_kv_heads)))


def attend_tiles(
    query: torch.Tensor,
    layer_pool: torch.Tensor,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    shape: TileShape,
    out: torch.Tensor,
) -> None:
    """Attention of the tokens in `tiles` over the KV in the blocks, their own included.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, last dimension dense.
        layer_pool: `[num_blocks, 2, num_kv_heads, block_size, head_dim]`: one layer of the pool, of the query's dtype.
        tables: `[num_sequences, max_blocks] int32`, last dimension dense; blocks beyond a sequence are not read.
        tiles: `[num_tiles, 4] int32`, contiguous: first batch row, number of tokens, position of the first token,
            line of `tables`.
        shape: The same for all tiles.
        out: `[num_tokens, num_heads, head_dim]`, contiguous; rows of the tiles are overwritten.
    """
    _, num_heads, head_dim = query.shape
    _, _, num_kv_heads, block_size, _ = layer_pool.shape
    num_splits = shape.num_splits
    assert num_splits == 1 or shape.max_tokens == 1
    partial, log_sums = out, out
    if num_splits > 1:
        partial = out.new_empty((len(tiles), num_heads, num_splits, head_dim), dtype=torch.float32)
        log_sums = partial.new_empty(len(tiles), num_heads, num_splits)
    group = num_heads // num_kv_heads
    group_padded = int(triton.next_power_of_2(group))
    head_dim_padded = max(_MIN_DOT, int(triton.next_power_of_2(head_dim)))
    kv_tile = min(64, _KV_TILE_BYTES // (head_dim_padded * layer_pool.element_size()))
    _attend_tiles[(len(tiles), num_kv_heads, num_splits)](
        query,
        layer_pool,
        tables,
        tiles,
        partial,
        log_sums,
        layer_pool.stride(1),
        layer_pool.stride(0),
        tables.stride(0),
        query.stride(0),
        query.stride(1),
        shape.scale * _LOG2_E,
        WINDOW=shape.window or 0,
        GROUP=group,
        GROUP_PADDED=group_padded,
        QUERY_ROWS=max(_MIN_DOT, group_padded * shape.max_tokens),
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=head_dim_padded,
        BLOCK_SIZE=block_size,
        NUM_SPLITS=num_splits,
        KV_TILE=max(_MIN_DOT, kv_tile),
        **_OPTIONS,
    )
    if num_splits > 1:
        _merge_splits[(len(tiles), num_heads)](
            partial, log_sums, tiles, out, HEAD_DIM=head_dim, HEAD_DIM_PADDED=head_dim_padded, NUM_SPLITS=num_splits
        )


def write_rows(key: torch.Tensor, value: torch.Tensor, layer_pool: torch.Tensor, places: torch.Tensor) -> None:
    """Store K and V of one step.

    Args:
        key: `[num_tokens, num_kv_heads, head_dim]`, last dimension dense.
        value: Like `key`.
        layer_pool: As `attend_tiles` takes it.
        places: `[num_tokens, 2] int32`, contiguous: block, and position in the block.
    """
    num_tokens, num_kv_heads, head_dim = key.shape
    _write_rows[(num_tokens, num_kv_heads)](
        key,
        value,
        layer_pool,
        places,
        layer_pool.stride(1),
        layer_pool.stride(0),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=int(triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=layer_pool.shape[3],
    )
