"""Root-mean-square normalisation, with the rounding of transformers."""

from __future__ import annotations

import torch


class RmsNorm:
    """`x / rms(x) * weight` over the last dimension, computed in fp32."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self._weight = weight
        self._epsilon = epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Args: `x` `[..., size]`; returns the same shape and dtype."""
        exact = x.float()
        variance = exact.pow(2).mean(-1, keepdim=True)
        return self._weight * (exact * torch.rsqrt(variance + self._epsilon)).to(x.dtype)
