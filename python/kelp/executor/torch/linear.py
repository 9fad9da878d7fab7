"""Matrix products with weights: the plain one, and whatever the machine does faster with the same result."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch.nn import functional

_PACKED_FOR_ROWS = 32
"""Batch size that oneDNN lays the weights out for; one layout served 1 to 512 rows equally well."""


class Linear(Protocol):
    """`x @ weight.T + bias`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Args: `x` `[num_rows, in]`; returns `[num_rows, out]`."""


class PlainLinear:
    """The product as torch does it; `weight` `[out, in]`, `bias` `[out]`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        return functional.linear(x, self._weight, self._bias)


class PackedLinear:
    """The product with the weights in oneDNN's own order: about twice as fast for few rows, same numbers."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Args: as `PlainLinear`; `weight` is copied."""
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """The fastest `Linear` for this weight on its device; may copy `weight`, which the caller then drops."""
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and can_pack():
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


@functools.cache
def can_pack() -> bool:
    """Whether this torch and processor have oneDNN's packed bf16 product, and it agrees with the plain one.

    The operators are torch's own but not public, hence the trial.
    """
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=generator).bfloat16() for size in ((48, 64), (5, 64)))
    try:
        packed = PackedLinear(weight)(x)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(packed.float(), PlainLinear(weight)(x).float(), rtol=0.02, atol=0.02)
