"""Attention of queries over keys and values that lie side by side: what is left after a gather.

torch's fused CPU kernel leaves the fastest instructions of a processor unused: for prompts in bf16 the batched products
of `products` take over.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from kelp.executor.torch.attention.products import fp32_product, has_fast_products
from kelp.executor.torch.native.kernels import kernels

_TILE = 128
"""Query positions of a prompt chunk that are computed at once."""

_MAX_SCORES = 1024 * 1024
"""How many scores of a tile may be computed at once; with more of them heads go one by one, to stay in the caches."""


def attend_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """A few query rows of each of many sequences.

    Args:
        query: `[num_sequences, num_kv_heads, num_rows, head_dim]`; heads that share a KV head are further rows.
        key: `[num_sequences, num_kv_heads, num_positions, head_dim]`.
        value: Like `key`.
        mask: Added to the scores; `[num_sequences, 1, 1 or num_rows, num_positions]` fp32, or None.
        scale: Factor on the scores.

    Returns:
        Shape and dtype of `query`.
    """
    if mask is not None:
        # Whatever lies at hidden positions, NaN included, must not reach the sum as 0 times itself.
        hidden = torch.isinf(mask).all(dim=2, keepdim=True).transpose(2, 3)
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        mask = mask.to(query.dtype)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def attend_span(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Consecutive positions of one sequence, the last of which is the last key.

    Args:
        query: `[num_rows, num_heads, head_dim]`.
        key: `[num_kv_heads, num_positions, head_dim]`.
        value: Like `key`.
        scale: Factor on the scores.
        window: How many latest positions a row sees, itself included; None for all.

    Returns:
        Shape and dtype of `query`, contiguous.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, num_positions, _ = key.shape
    start = num_positions - num_rows
    out = query.new_empty(num_rows, num_heads, head_dim)
    grouped_out = out.view(num_rows, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    attend_tile = _attend_fused
    if has_fast_products(query):
        attend_tile = _attend_tile
        query, key = query.float(), key.float()
    grouped = query.view(num_rows, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    for first in range(0, num_rows, _TILE):
        rows = slice(first, min(first + _TILE, num_rows))
        begin = 0 if window is None else max(0, start + first - window + 1)
        seen = slice(begin, start + rows.stop)
        view = _View(window=None if window is None or seen.stop <= window else window, scale=scale)
        grouped_out[:, :, rows] = attend_tile(grouped[:, :, rows], key[:, seen], value[:, seen], view)
    return out


@dataclass(frozen=True, slots=True)
class _View:
    """What the rows of a tile see: themselves and the `window` latest positions before, or all; and how sharply."""

    window: int | None
    scale: float

    def mask(self, num_rows: int, num_positions: int, device: torch.device) -> torch.Tensor:
        """See `_edge_mask`."""
        return _edge_mask(num_rows, num_rows if self.window is None else num_positions, self.window, device)


@functools.lru_cache(maxsize=16)
def _edge_mask(num_rows: int, num_covered: int, window: int | None, device: torch.device) -> torch.Tensor:
    """What to add to the scores of the last `num_covered` positions: 0 where a row sees one, else -inf.

    Returns:
        `[num_rows, num_covered]` fp32; without a window all but the last `num_rows` positions are seen by all rows.
    """
    row = torch.arange(num_covered - num_rows, num_covered, device=device)[:, None]
    position = torch.arange(num_covered, device=device)[None, :]
    hidden = position > row
    if window is not None:
        hidden |= position <= row - window
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)


def _attend_fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, view: _View) -> torch.Tensor:
    """`query` `[num_kv_heads, group, num_rows, head_dim]` over `key` `[num_kv_heads, num_positions, head_dim]`."""
    shared = (*query.shape[:2], *key.shape[1:])
    mask = view.mask(query.shape[2], key.shape[1], query.device)
    full_mask = pad(mask, (key.shape[1] - mask.shape[1], 0)).to(query.dtype)
    key, value = key[:, None].expand(shared), value[:, None].expand(shared)
    return scaled_dot_product_attention(query, key, value, attn_mask=full_mask, scale=view.scale)


def _attend_tile(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, view: _View) -> torch.Tensor:
    """Like `_attend_fused`, for bf16 numbers; `query` and `key` hold them as fp32."""
    num_heads = len(query) if query.shape[:3].numel() * key.shape[1] <= _MAX_SCORES else 1
    parts = zip(*(torch.split(tensor, num_heads) for tensor in (query, key, value)), strict=True)
    return torch.cat([_attend_heads(q, k, v, view) for q, k, v in parts])


def _attend_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, view: _View) -> torch.Tensor:
    """Some KV heads of a tile."""
    num_rows = query.shape[2]
    scores = fp32_product(query.flatten(1, 2), key.transpose(1, 2))
    native = kernels()
    if native is not None:
        weights = native.causal_softmax(scores, num_rows, view.window, view.scale)
    else:
        mask = view.mask(num_rows, key.shape[1], query.device)
        scores.mul_(view.scale).view(*query.shape[:3], -1)[..., -mask.shape[1] :].add_(mask)
        weights = torch.softmax(scores, dim=-1).to(value.dtype)
    return torch.bmm(weights, value).view(query.shape)
