"""Inverse frequencies of rotary embeddings, with the arithmetic, and hence the rounding, of transformers."""

from __future__ import annotations

import math

import torch

from kelp.executor.torch.decoder_config import LinearRope, Llama3Rope, RopeConfig, YarnRope


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """`[head_dim / 2] fp32`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    periods: torch.Tensor = rope.theta**exponents
    inverse = 1.0 / periods
    scaling = rope.scaling
    if isinstance(scaling, LinearRope):
        return inverse / scaling.factor
    if isinstance(scaling, Llama3Rope):
        return _scale_llama3(inverse, scaling)
    if isinstance(scaling, YarnRope):
        return _scale_yarn(periods, scaling, rope.theta)
    return inverse


def rotary_magnitude(rope: RopeConfig) -> float:
    """Factor on cosines and sines."""
    return rope.scaling.attention_factor if isinstance(rope.scaling, YarnRope) else 1.0


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


def _scale_yarn(periods: torch.Tensor, scaling: YarnRope, theta: float) -> torch.Tensor:
    """Source: `_compute_yarn_parameters` of transformers' modeling_rope_utils."""
    half = len(periods)
    context = scaling.original_max_position_embeddings

    def dimension_of(num_rotations: float) -> float:
        return (2 * half * math.log(context / (num_rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    # Equal bounds would divide by zero.
    width = 0.001 if low == high else high - low
    kept = 1 - torch.clamp((torch.arange(half, dtype=torch.float32) - low) / width, 0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept
