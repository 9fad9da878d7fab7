"""Rotary position embedding with the arithmetic, and hence the rounding, of transformers' Llama."""

from __future__ import annotations

import math

import torch

from kelp.executor.torch.model_config import Llama3Rope, LlamaConfig


class RotaryTable:
    """Cosines and sines of all positions, computed once."""

    def __init__(self, config: LlamaConfig, num_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        positions = torch.arange(num_positions, dtype=torch.float32)
        angles = positions[:, None] * _inverse_frequencies(config)[None, :]
        both_halves = torch.cat((angles, angles), dim=-1)
        self._cos = both_halves.cos().to(device=device, dtype=dtype)
        self._sin = both_halves.sin().to(device=device, dtype=dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for `positions` `[num_tokens] int64`: each `[num_tokens, 1, head_dim]`."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `[num_tokens, num_heads, head_dim]` by the angles of `RotaryTable.at`."""
    half = x.shape[-1] // 2
    swapped = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos) + (swapped * sin)


def _inverse_frequencies(config: LlamaConfig) -> torch.Tensor:
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inverse: torch.Tensor = 1.0 / (config.rope_theta**exponents)
    return inverse if config.rope_scaling is None else _scale_llama3(inverse, config.rope_scaling)


def _scale_llama3(inverse: torch.Tensor, scaling: Llama3Rope) -> torch.Tensor:
    """Source: `_compute_llama3_parameters` of transformers' modeling_rope_utils."""
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / inverse
    scaled = torch.where(wavelength > context / low, inverse / scaling.factor, inverse)
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    is_medium = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(is_medium, blended, scaled)
