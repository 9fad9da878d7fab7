"""Paged attention through torch's own `varlen_attn`: one call per layer for the whole mixed batch.

Which kernel answers depends on what is active in torch: FlashAttention 2, which it is built with, takes blocks of a
multiple of 256 tokens only, wants cumulative KV lengths although it has the block table, and must be told not to
split (its own choice of splits yields NaN with block tables: pytorch/torchtitan#3235). FlashAttention 3 and 4, where
the operator has activated them, take any block size. All take strided pools whose last dimension is dense.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import attention as torch_attention

from kelp.executor.batching.batch import Chunk
from kelp.executor.torch.attention.base import AttentionShape
from kelp.executor.torch.attention.paged import block_tables, token_places
from kelp.executor.torch.staging import stage_int32

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # older versions of torch
    varlen_attn = None

_NEEDED_PARAMETERS = frozenset(("block_table", "seqused_k", "num_splits", "enable_gqa", "window_size", "scale"))
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256
_FLASH_2_BLOCK_SIZE = 256
_MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """One step's work, equal for all layers; all int32.

    Attributes:
        blocks: `[num_tokens]`, where KV goes.
        offsets: `[num_tokens]`, position in the block.
        tables: `[num_sequences, max_blocks]`.
        query_ends: `[num_sequences + 1]`, cumulative numbers of tokens, from 0.
        lengths: `[num_sequences]`, KV positions of each, its new tokens included.
        kv_ends: `[num_sequences + 1]`, cumulative `lengths`, or None where the kernel must not get it.
        max_tokens: Most tokens of one sequence.
    """

    blocks: torch.Tensor
    offsets: torch.Tensor
    tables: torch.Tensor
    query_ends: torch.Tensor
    lengths: torch.Tensor
    kv_ends: torch.Tensor | None
    max_tokens: int


def why_not_varlen(pool: torch.Tensor) -> str | None:
    """Why torch here has no `varlen_attn` that could read `pool`; None if it should."""
    missing = _NEEDED_PARAMETERS.difference(_parameters(varlen_attn)) if varlen_attn is not None else _NEEDED_PARAMETERS
    block_size, head_dim = pool.shape[4:]
    if missing:
        return f"torch {torch.__version__} has no varlen_attn with {', '.join(sorted(missing))}"
    if not pool.is_cuda:
        return f"varlen_attn needs a CUDA device, the pool is on {pool.device}"
    if torch.cuda.get_device_capability(pool.device) < _MIN_CAPABILITY:
        return f"varlen_attn needs compute capability {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]}"
    if pool.dtype not in _DTYPES:
        return f"varlen_attn has no kernel for {pool.dtype}"
    if head_dim > _MAX_HEAD_DIM or head_dim % 8:
        return f"varlen_attn has no kernel for head_dim {head_dim}"
    if _is_flash_2() and block_size % _FLASH_2_BLOCK_SIZE:
        return (
            f"FlashAttention 2 takes blocks of multiples of {_FLASH_2_BLOCK_SIZE}, executor.block_size is {block_size}"
        )
    return None


class VarlenAttention:
    """See `attention.base.Attention` and `attention.paged.RowAttention`. Not thread-safe."""

    def __init__(self, pool: torch.Tensor, shape: AttentionShape) -> None:
        """Args: `pool` as `attention.base` says; see `why_not_varlen`."""
        self._pool = pool
        self._shape = shape
        self._block_size = pool.shape[4]
        self._is_gqa = shape.num_heads != pool.shape[3]
        self._is_flash_2 = _is_flash_2()
        self._num_splits = 1 if self._is_flash_2 else None

    def plan(self, chunks: Sequence[Chunk]) -> VarlenPlan:
        """See `Attention`."""
        counts = np.asarray([len(chunk.tokens) for chunk in chunks])
        lengths = np.asarray([chunk.start for chunk in chunks]) + counts
        places = token_places(chunks, self._block_size)
        arrays = (places.T, block_tables(chunks, self._block_size), _ends(counts), lengths, _ends(lengths))
        both, tables, query_ends, device_lengths, kv_ends = stage_int32(arrays, self._pool.device)
        return VarlenPlan(
            blocks=both[0],
            offsets=both[1],
            tables=tables,
            query_ends=query_ends,
            lengths=device_lengths,
            kv_ends=kv_ends if self._is_flash_2 else None,
            max_tokens=int(counts.max()),
        )

    def plan_rows(self, positions: torch.Tensor, tables: torch.Tensor) -> VarlenPlan:
        """See `RowAttention`."""
        lengths = (positions + 1).int()
        ends = torch.cat((lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)))
        return VarlenPlan(
            blocks=tables.gather(1, (positions // self._block_size)[:, None])[:, 0],
            offsets=(positions % self._block_size).int(),
            tables=tables.contiguous(),
            query_ends=torch.arange(len(positions) + 1, dtype=torch.int32, device=positions.device),
            lengths=lengths,
            kv_ends=ends if self._is_flash_2 else None,
            max_tokens=1,
        )

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: VarlenPlan
    ) -> torch.Tensor:
        """See `Attention`."""
        keys, values = self._pool[:, layer].permute(1, 0, 3, 2, 4)
        keys[plan.blocks, plan.offsets] = key
        values[plan.blocks, plan.offsets] = value
        window = self._shape.windows[layer]
        assert varlen_attn is not None
        out: torch.Tensor = varlen_attn(
            query if query.stride(-1) == 1 else query.contiguous(),
            keys,
            values,
            plan.query_ends,
            plan.kv_ends,
            plan.max_tokens,
            plan.tables.shape[1] * self._block_size,
            scale=self._shape.scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=self._is_gqa,
            seqused_k=plan.lengths,
            block_table=plan.tables,
            num_splits=self._num_splits,
        )
        return out.flatten(1)


def _is_flash_2() -> bool:
    current: Callable[[], str | None] = getattr(torch_attention, "current_flash_attention_impl", lambda: None)
    return current() in (None, "FA2")


def _parameters(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _ends(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(counts)))
