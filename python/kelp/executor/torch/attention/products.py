"""Attention scores and sums of bf16 numbers on a CPU, as exact as in fp32.

torch's bf16 product rounds its result to bf16, far too coarse for scores. Two ways round that:

- A second bf16 product, whose accumulator starts at minus the rounded result, yields what was lost. Best for single
  tokens, where reading the keys is the cost.
- An fp32 product. By default it goes to MKL, which is slow on other makers' processors; one that may round its operands
  to bf16 goes to oneDNN, 2.5 times as fast here, and bf16 numbers lose nothing by that. Best for prompts.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

import torch


def has_fast_products(tensor: torch.Tensor) -> bool:
    """Whether tensors like this one are multiplied faster here than by torch's fused attention."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and _MATMUL is not None


def compensated_scores(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale * query @ key.T` by two bf16 products.

    Args:
        query: `[num_pairs, num_rows, head_dim]` bf16.
        key: `[num_pairs, num_positions, head_dim]` bf16.
        scale: Any; a power of two costs nothing.

    Returns:
        `[num_pairs, num_rows, num_positions]` fp32.
    """
    if _is_power_of_two(scale):
        query, scale = query * scale, 1.0
    transposed = key.transpose(1, 2)
    rounded = torch.bmm(query, transposed)
    error = torch.baddbmm(rounded, query, transposed, beta=-1)
    scores = rounded.float().add_(error)
    return scores if scale == 1.0 else scores.mul_(scale)


def fp32_scores(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Like `compensated_scores`, by one product of fp32 tensors that hold bf16 numbers."""
    if _is_power_of_two(scale):
        query, scale = query * scale, 1.0
    with _ONE_DNN:
        scores = torch.bmm(query, key.transpose(1, 2))
    return scores if scale == 1.0 else scores.mul_(scale)


def fp32_product(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`weights @ value`, fp32; `value` `[num_pairs, num_positions, head_dim]` holds bf16 numbers."""
    with _ONE_DNN:
        return torch.bmm(weights, value)


def _is_power_of_two(number: float) -> bool:
    return math.frexp(number)[0] == 0.5


class _OneDnnProducts:
    """Sends fp32 products of this process to oneDNN, while entered."""

    def __enter__(self) -> None:
        self._before = _MATMUL.fp32_precision
        _MATMUL.fp32_precision = "bf16"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _MATMUL.fp32_precision = self._before


_MATMUL: Any = getattr(torch.backends.mkldnn, "matmul", None)
"""The switch; None in a torch that has none yet."""

_ONE_DNN = _OneDnnProducts()
