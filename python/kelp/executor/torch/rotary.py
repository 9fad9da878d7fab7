"""Rotary position embedding with the arithmetic, and hence the rounding, of transformers' Llama."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kelp.executor.torch.decoder_config import RopeConfig
from kelp.executor.torch.frequencies import inverse_frequencies, rotary_magnitude
from kelp.executor.torch.native.kernels import kernels_for


@dataclass(frozen=True, slots=True)
class RotarySize:
    """Of one table."""

    num_positions: int
    head_dim: int


class RotaryTable:
    """Cosines and sines of all positions, computed once."""

    def __init__(self, rope: RopeConfig, size: RotarySize, dtype: torch.dtype, device: torch.device) -> None:
        positions = torch.arange(size.num_positions, dtype=torch.float32)
        angles = positions[:, None] * inverse_frequencies(rope, size.head_dim)[None, :]
        both_halves = torch.cat((angles, angles), dim=-1)
        magnitude = rotary_magnitude(rope)
        self._cos = (both_halves.cos() * magnitude).to(device=device, dtype=dtype)
        sin = both_halves.sin() * magnitude
        sin[:, : size.head_dim // 2].neg_()
        self._sin = sin.to(device=device, dtype=dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for `positions` `[num_tokens] int64`: each `[num_tokens, 1, head_dim]`.

        The first half of the sines is negated, so that `rotate` need not negate half of every head.
        """
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `[num_tokens, num_heads, head_dim]` by the angles of `RotaryTable.at`."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return (x * cos).add_(swapped.mul_(sin))


def rotate_first(heads: torch.Tensor, num_rotated: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first heads of `[num_tokens, num_heads, head_dim]` rotated, which may overwrite them.

    Returns:
        `[num_tokens, num_rotated, head_dim]`.
    """
    kernels = kernels_for(heads)
    if kernels is None:
        return rotate(heads[:, :num_rotated], cos, sin)
    kernels.rotate(heads, num_rotated, cos, sin)
    return heads[:, :num_rotated]
