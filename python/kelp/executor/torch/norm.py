"""Root-mean-square normalisation, with the rounding of transformers."""

from __future__ import annotations

import torch
from torch.nn.functional import rms_norm

from kelp.executor.torch.native.kernels import kernels_for


class RmsNorm:
    """`x / rms(x) * weight` over the last dimension, computed in fp32 and rounded before the product."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self._weight = weight
        self._epsilon = epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Args: `x` `[..., size]`; returns the same shape and dtype."""
        kernels = kernels_for(x)
        if kernels is not None:
            return kernels.rms_norm(x, self._weight, self._epsilon)
        return rms_norm(x, self._weight.shape, None, self._epsilon).mul_(self._weight)


class OffsetRmsNorm:
    """`x / rms(x) * (1 + weight)` over the last dimension, rounded once at the end: Gemma's norm."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self._factor = 1.0 + weight.float()
        self._epsilon = epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Args: `x` `[..., size]`; returns the same shape and dtype."""
        exact = x.float()
        variance = exact.pow(2).mean(-1, keepdim=True)
        return (exact * torch.rsqrt(variance + self._epsilon) * self._factor).to(x.dtype)


Norm = RmsNorm | OffsetRmsNorm
