"""Whether a backend computes what it should on this very device: it must agree with the plain one on small steps.

Kernels depend on the device, on its driver and on the versions of torch and the compiler, in more ways than a list of
conditions could cover; a trial takes a moment at load, and a kernel that answers wrongly never gets to serve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kelp.core.types import BlockId, num_blocks_for
from kelp.executor.batching.batch import Chunk
from kelp.executor.torch.attention.base import Attention, AttentionShape
from kelp.executor.torch.attention.gather import GatherAttention
from kelp.executor.torch.attention.paged import RowAttention, block_tables

_TOLERANCE = {torch.float32: 1e-3}
_HALF_TOLERANCE = 3e-2
"""Absolute; values are drawn from a normal distribution of width 1."""

_LONG = 1000
"""Positions before a token: enough for kernels that share out what they read."""

Factory = Callable[[torch.Tensor, AttentionShape], Attention]


def why_trial_fails(factory: Factory, pool: torch.Tensor, shape: AttentionShape) -> str | None:
    """What a backend does wrong with blocks like those of `pool`, which stays as it is; None if nothing.

    Each distinct window of the model is one layer of the trial.
    """
    reduced = AttentionShape(shape.num_heads, shape.scale, tuple(dict.fromkeys(shape.windows)))
    try:
        worst = _largest_difference(factory, pool, reduced)
    except Exception as error:  # A compiler, driver or kernel may fail in any way; each is a refusal.
        return f"it failed a trial: {type(error).__name__}: {error}".splitlines()[0]
    tolerance = _TOLERANCE.get(pool.dtype, _HALF_TOLERANCE)
    return None if worst <= tolerance else f"it failed a trial: off by {worst:.3g}, tolerated are {tolerance:.3g}"


@torch.inference_mode()
def _largest_difference(factory: Factory, pool: torch.Tensor, shape: AttentionShape) -> float:
    """Over a mixed step, and over a decoding step planned by the device; infinity for NaN."""
    block_size = pool.shape[4]
    mixed = _chunks([(_LONG, 1), (2 * block_size + 1, 1), (block_size, 3), (block_size - 1, 37), (0, 1)], block_size)
    decodes = _chunks([(_LONG, 1), (2 * block_size, 1), (0, 1), (block_size - 1, 1)], block_size)
    num_blocks = 1 + max(max(chunk.block_ids) for chunk in (*mixed, *decodes))
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(num_blocks, len(shape.windows), *pool.shape[2:], generator=generator).to(pool)
    subject, plain = factory(random.clone(), shape), GatherAttention(random, shape)
    worst = _compare((subject, subject.plan(mixed)), (plain, plain.plan(mixed)), mixed, pool, shape)
    if isinstance(subject, RowAttention):
        positions = torch.tensor([chunk.start for chunk in decodes], device=pool.device)
        tables = torch.from_numpy(block_tables(decodes, block_size)).to(pool.device)
        by_rows = subject.plan_rows(positions, tables)
        worst = max(worst, _compare((subject, by_rows), (plain, plain.plan(decodes)), decodes, pool, shape))
    return worst


def _compare(
    subject: tuple[Attention, Any],
    plain: tuple[Attention, Any],
    chunks: list[Chunk],
    pool: torch.Tensor,
    shape: AttentionShape,
) -> float:
    """Largest difference of two backends, each with its plan for `chunks`, in any layer."""
    num_tokens, num_kv_heads = sum(len(chunk.tokens) for chunk in chunks), pool.shape[3]
    generator = torch.Generator().manual_seed(2)
    worst = 0.0
    for layer in range(len(shape.windows)):
        num_all = shape.num_heads + 2 * num_kv_heads
        fused = torch.randn(num_tokens, num_all, pool.shape[5], generator=generator).to(pool)
        query, key, value = torch.split(fused, [shape.num_heads, num_kv_heads, num_kv_heads], dim=1)
        found, expected = (backend.attend(layer, query, key, value, plan).float() for backend, plan in (subject, plain))
        difference = (found - expected).abs().max().item()
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


def _chunks(spans: list[tuple[int, int]], block_size: int) -> list[Chunk]:
    """Chunks of (start, number of tokens) whose blocks do not follow each other."""
    counts = [num_blocks_for(start + num_tokens, block_size) for start, num_tokens in spans]
    ids = [BlockId(value) for value in reversed(range(sum(counts)))]
    chunks = []
    for (start, num_tokens), count in zip(spans, counts, strict=True):
        own, ids = ids[:count], ids[count:]
        chunks.append(Chunk(np.zeros(num_tokens, np.int32), start, own))
    return chunks
