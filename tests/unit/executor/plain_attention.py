"""Paged attention as the definition says it, one token at a time in float64; and random steps to compare on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kelp.executor.batching.batch import Chunk
from kelp.executor.torch.attention.base import Attention, AttentionShape


@dataclass(frozen=True)
class Geometry:
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 4
    windows: tuple[int | None, ...] = (None, None)
    dtype: torch.dtype = torch.float32
    num_blocks: int = 40
    device: str = "cpu"

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(self.num_heads, self.head_dim**-0.5, self.windows)

    def pool(self, seed: int = 0) -> torch.Tensor:
        size = (self.num_blocks, len(self.windows), 2, self.num_kv_heads, self.block_size, self.head_dim)
        return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(self.dtype).to(self.device)

    def qkv(self, num_tokens: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key, value: strided, as slices of one projection are."""
        generator = torch.Generator().manual_seed(seed)
        num_all = self.num_heads + 2 * self.num_kv_heads
        fused = torch.randn(num_tokens, num_all, self.head_dim, generator=generator).to(self.dtype).to(self.device)
        query, key, value = fused.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return query, key, value


def chunks_of(spans: list[tuple[int, int]], geometry: Geometry, seed: int = 2) -> list[Chunk]:
    """Chunks of (start, number of tokens), with shuffled blocks of their own, some more than they need."""
    ids = np.random.default_rng(seed).permutation(geometry.num_blocks).tolist()
    chunks = []
    for start, num_tokens in spans:
        num_needed = -(-(start + num_tokens) // geometry.block_size)
        own, ids = ids[: num_needed + 1], ids[num_needed + 1 :]
        assert len(own) >= num_needed, "the pool of the case is too small"
        chunks.append(Chunk(np.zeros(num_tokens, np.int32), start, own))
    return chunks


def run(backend: Attention, chunks: list[Chunk], geometry: Geometry) -> torch.Tensor:
    """Output of every layer for one random step: `[num_layers, num_tokens, num_heads * head_dim]`."""
    plan = backend.plan(chunks)
    num_tokens = sum(len(chunk.tokens) for chunk in chunks)
    layers = range(len(geometry.windows))
    return torch.stack([backend.attend(layer, *geometry.qkv(num_tokens, layer), plan) for layer in layers])


class PlainAttention:
    """See `attention.base.Attention`."""

    def __init__(self, pool: torch.Tensor, shape: AttentionShape) -> None:
        self.pool = pool
        self.shape = shape

    def plan(self, chunks: list[Chunk]) -> list[Chunk]:
        return list(chunks)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: list[Chunk]
    ) -> torch.Tensor:
        block_size, num_kv_heads = self.pool.shape[4], self.pool.shape[3]
        places = [(chunk, chunk.start + index) for chunk in plan for index in range(len(chunk.tokens))]
        for row, (chunk, position) in enumerate(places):
            block = self.pool[chunk.block_ids[position // block_size], layer]
            block[0, :, position % block_size], block[1, :, position % block_size] = key[row], value[row]
        rows = []
        for row, (chunk, position) in enumerate(places):
            first = max(0, position + 1 - (self.shape.windows[layer] or position + 1))
            blocks = self.pool[list(chunk.block_ids), layer].double()
            kv = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, first : position + 1]
            k, v = kv.repeat_interleave(self.shape.num_heads // num_kv_heads, dim=1)
            scores = (k @ query[row].double()[:, :, None])[:, :, 0] * self.shape.scale
            rows.append((torch.softmax(scores, dim=-1)[:, None, :] @ v).flatten().to(query.dtype))
        return torch.stack(rows)
