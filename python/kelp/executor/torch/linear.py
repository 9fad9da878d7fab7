"""Matrix products with weights: the plain one, and whatever the machine does faster with the same result."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional


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


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """The fastest `Linear` for this weight on its device; may copy `weight`, which the caller then drops."""
    return PlainLinear(weight, bias)
