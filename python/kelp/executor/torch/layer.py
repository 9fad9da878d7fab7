"""One decoder layer. Arithmetic follows transformers' models operation by operation, so that greedy tokens agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from kelp.executor.torch.attention.base import Attention
from kelp.executor.torch.inputs import StepInputs
from kelp.executor.torch.linear import Linear
from kelp.executor.torch.norm import RmsNorm
from kelp.executor.torch.rotary import rotate

CosSin = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class HeadShape:
    """How the fused projection's output splits into heads: queries, then keys, then values."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class SelfAttention:
    """Projections and rotation round the paged attention."""

    def __init__(self, index: int, qkv: Linear, out: Linear, heads: HeadShape, attention: Attention) -> None:
        self._index = index
        self._qkv = qkv
        self._out = out
        self._heads = heads
        self._attention = attention

    def __call__(self, hidden: torch.Tensor, cos_sin: CosSin, inputs: StepInputs) -> torch.Tensor:
        """Args: `hidden` `[num_tokens, hidden_size]`, normalised; returns the same shape."""
        num_heads, num_kv_heads = self._heads.num_heads, self._heads.num_kv_heads
        qkv = self._qkv(hidden).view(len(hidden), -1, self._heads.head_dim)
        rotated = rotate(qkv[:, : num_heads + num_kv_heads], *cos_sin)
        query, key = rotated[:, :num_heads], rotated[:, num_heads:]
        value = qkv[:, num_heads + num_kv_heads :]
        return self._out(self._attention.attend(self._index, query, key, value, inputs.attention))


class GatedMlp:
    """`down(silu(gate(x)) * up(x))` with gate and up in one product."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self._gate_up = gate_up
        self._down = down

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Args: `hidden` `[num_tokens, hidden_size]`, normalised; returns the same shape."""
        gate, up = self._gate_up(hidden).chunk(2, dim=-1)
        return self._down(silu(gate) * up)


class DecoderLayer:
    """Attention and MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, input_norm: RmsNorm, attention: SelfAttention, mlp_norm: RmsNorm, mlp: GatedMlp) -> None:
        self._input_norm = input_norm
        self._attention = attention
        self._mlp_norm = mlp_norm
        self._mlp = mlp

    def __call__(self, hidden: torch.Tensor, cos_sin: CosSin, inputs: StepInputs) -> torch.Tensor:
        """Args: `hidden` `[num_tokens, hidden_size]`; returns the same shape."""
        hidden = hidden + self._attention(self._input_norm(hidden), cos_sin, inputs)
        return hidden + self._mlp(self._mlp_norm(hidden))
