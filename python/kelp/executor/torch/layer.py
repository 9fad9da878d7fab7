"""One decoder layer. Arithmetic follows transformers' models operation by operation, so that greedy tokens agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch.nn.functional import gelu, silu

from kelp.executor.torch.attention.base import Attention
from kelp.executor.torch.decoder_config import Activation
from kelp.executor.torch.inputs import StepInputs
from kelp.executor.torch.linear import Linear
from kelp.executor.torch.native.kernels import kernels_for
from kelp.executor.torch.norm import Norm
from kelp.executor.torch.rotary import rotate_first

CosSin = tuple[torch.Tensor, torch.Tensor]

_ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: silu,
    Activation.GELU_TANH: partial(gelu, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class HeadShape:
    """How the fused projection's output splits into heads: queries, then keys, then values."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class QkNorms:
    """Norms over `head_dim` of each query and key head, before its rotation."""

    query: Norm
    key: Norm


@dataclass(frozen=True, slots=True)
class Projections:
    """The linears of an attention, and the norms of families that have them."""

    qkv: Linear
    out: Linear
    norms: QkNorms | None = None


class SelfAttention:
    """Projections and rotation round the paged attention."""

    def __init__(self, index: int, projections: Projections, heads: HeadShape, attention: Attention) -> None:
        self._index = index
        self._qkv = projections.qkv
        self._out = projections.out
        self._norms = projections.norms
        self._heads = heads
        self._attention = attention

    def __call__(self, hidden: torch.Tensor, cos_sin: CosSin, inputs: StepInputs) -> torch.Tensor:
        """Args: `hidden` `[num_tokens, hidden_size]`, normalised; returns the same shape."""
        num_heads, num_kv_heads = self._heads.num_heads, self._heads.num_kv_heads
        qkv = self._qkv(hidden).view(len(hidden), -1, self._heads.head_dim)
        if self._norms is not None:
            qkv[:, :num_heads] = self._norms.query(qkv[:, :num_heads])
            keys = slice(num_heads, num_heads + num_kv_heads)
            qkv[:, keys] = self._norms.key(qkv[:, keys])
        rotated = rotate_first(qkv, num_heads + num_kv_heads, *cos_sin)
        query, key = rotated[:, :num_heads], rotated[:, num_heads:]
        value = qkv[:, num_heads + num_kv_heads :]
        return self._out(self._attention.attend(self._index, query, key, value, inputs.attention))


class Mlp(Protocol):
    """What follows the attention."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Args: `hidden` `[num_tokens, hidden_size]`, normalised; returns the same shape."""


class GatedMlp:
    """`down(activation(gate(x)) * up(x))` with gate and up in one product."""

    def __init__(self, gate_up: Linear, down: Linear, activation: Activation) -> None:
        self._gate_up = gate_up
        self._down = down
        self._activation = activation

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Args: `hidden` `[num_tokens, hidden_size]`, normalised; returns the same shape."""
        return self._down(gated(self._gate_up(hidden), self._activation))


def gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """`activation(gate) * up` of `[num_tokens, 2 * size]`; returns `[num_tokens, size]`."""
    kernels = kernels_for(gate_up) if activation is Activation.SILU else None
    if kernels is not None:
        return kernels.silu_multiply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return _ACTIVATIONS[activation](gate).mul_(up)


class DecoderLayer:
    """Attention and MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, input_norm: Norm, attention: SelfAttention, mlp_norm: Norm, mlp: Mlp) -> None:
        self._input_norm = input_norm
        self._attention = attention
        self._mlp_norm = mlp_norm
        self._mlp = mlp

    def __call__(self, hidden: torch.Tensor, cos_sin: CosSin, inputs: StepInputs) -> torch.Tensor:
        """Args: `hidden` `[num_tokens, hidden_size]`; returns the same shape."""
        hidden = self._attention(self._input_norm(hidden), cos_sin, inputs).add_(hidden)
        return self._mlp(self._mlp_norm(hidden)).add_(hidden)


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Norms of what attention and MLP take, or of what they give back."""

    attention: Norm
    mlp: Norm


class PostNormDecoderLayer:
    """Attention and MLP between two norms each, then added to the residual stream."""

    def __init__(self, attention: SelfAttention, mlp: Mlp, pre_norms: LayerNorms, post_norms: LayerNorms) -> None:
        self._attention = attention
        self._mlp = mlp
        self._pre_norms = pre_norms
        self._post_norms = post_norms

    def __call__(self, hidden: torch.Tensor, cos_sin: CosSin, inputs: StepInputs) -> torch.Tensor:
        """Args: `hidden` `[num_tokens, hidden_size]`; returns the same shape."""
        attended = self._attention(self._pre_norms.attention(hidden), cos_sin, inputs)
        hidden = hidden + self._post_norms.attention(attended)
        return hidden + self._post_norms.mlp(self._mlp(self._pre_norms.mlp(hidden)))
