"""The Llama forward pass for one mixed batch: all tokens of a step through the linears at once.

Arithmetic follows transformers' modeling_llama operation by operation, so that greedy tokens agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import embedding, linear, silu

from kelp.executor.torch.attention import AttentionPlan, PagedAttention
from kelp.executor.torch.batch import Chunk
from kelp.executor.torch.model_config import LlamaConfig
from kelp.executor.torch.rotary import RotaryTable, rotate
from kelp.executor.torch.weights import LayerWeights, LlamaWeights


class LlamaModel:
    """A model bound to one KV pool. Not thread-safe."""

    def __init__(self, config: LlamaConfig, weights: LlamaWeights, pool: torch.Tensor, max_model_tokens: int) -> None:
        """Args: `pool` as `attention.PagedAttention` takes it, of the weights' dtype and device."""
        self._config = config
        self._weights = weights
        self._device = pool.device
        self._attention = PagedAttention(pool)
        self._rotary = RotaryTable(config, max_model_tokens, pool.dtype, pool.device)

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute the chunks' KV and the logits that sampling needs.

        Returns:
            `[num_samples, vocab_size]` in the model's dtype: one row per chunk with `sample` set.
        """
        lengths = np.asarray([len(chunk.tokens) for chunk in chunks])
        positions = np.concatenate([np.arange(chunk.start, chunk.start + len(chunk.tokens)) for chunk in chunks])
        tokens = np.concatenate([chunk.tokens for chunk in chunks])
        last_rows = np.cumsum(lengths) - 1
        sampled_rows = last_rows[[chunk.sample is not None for chunk in chunks]]

        plan = self._attention.plan(chunks)
        cos_sin = self._rotary.at(torch.from_numpy(positions).to(self._device))
        hidden = embedding(torch.from_numpy(tokens).long().to(self._device), self._weights.embedding)
        for index, layer in enumerate(self._weights.layers):
            hidden = hidden + self._attend(index, layer, self._norm(hidden, layer.input_norm), cos_sin, plan)
            hidden = hidden + _mlp(layer, self._norm(hidden, layer.mlp_norm))
        wanted = hidden[torch.from_numpy(sampled_rows).to(self._device)]
        return linear(self._norm(wanted, self._weights.final_norm), self._weights.lm_head)

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        hidden: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
    ) -> torch.Tensor:
        num_heads, num_kv_heads = self._config.num_heads, self._config.num_kv_heads
        qkv = linear(hidden, layer.qkv).view(len(hidden), -1, self._config.head_dim)
        rotated = rotate(qkv[:, : num_heads + num_kv_heads], *cos_sin)
        query, key = rotated[:, :num_heads].contiguous(), rotated[:, num_heads:]
        value = qkv[:, num_heads + num_kv_heads :]
        return linear(self._attention.attend(index, query, key, value, plan), layer.attention_out)

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        exact = hidden.float()
        variance = exact.pow(2).mean(-1, keepdim=True)
        return weight * (exact * torch.rsqrt(variance + self._config.rms_norm_eps)).to(hidden.dtype)


def _mlp(layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
    gate, up = linear(hidden, layer.gate_up).chunk(2, dim=-1)
    return linear(silu(gate) * up, layer.mlp_down)
