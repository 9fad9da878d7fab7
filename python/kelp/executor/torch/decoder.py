"""The forward pass for one mixed batch: all tokens of a step through the linears at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import embedding

from kelp.executor.torch.attention.base import Attention, AttentionShape
from kelp.executor.torch.attention.gather import GatherAttention
from kelp.executor.torch.batch import Chunk
from kelp.executor.torch.inputs import StepInputs, make_inputs
from kelp.executor.torch.layer import DecoderLayer, GatedMlp, HeadShape, SelfAttention
from kelp.executor.torch.linear import make_linear
from kelp.executor.torch.model_config import LlamaConfig
from kelp.executor.torch.norm import RmsNorm
from kelp.executor.torch.rotary import RotaryTable
from kelp.executor.torch.weights import LayerWeights, LlamaWeights


class Decoder:
    """A model bound to one KV pool. Not thread-safe."""

    def __init__(self, config: LlamaConfig, weights: LlamaWeights, pool: torch.Tensor, max_model_tokens: int) -> None:
        """Args: `pool` as `attention.base` takes it, of the weights' dtype and device."""
        self._device = pool.device
        shape = AttentionShape(config.num_heads, config.head_dim**-0.5, (None,) * config.num_layers)
        self._attention: Attention = GatherAttention(pool, shape)
        self._rotary = RotaryTable(config, max_model_tokens, pool.dtype, pool.device)
        self._embedding = weights.embedding
        self._layers = [self._layer(config, index, layer) for index, layer in enumerate(weights.layers)]
        self._final_norm = RmsNorm(weights.final_norm, config.rms_norm_eps)
        self._lm_head = make_linear(weights.lm_head)

    def prepare(self, chunks: Sequence[Chunk]) -> StepInputs:
        """Host work of a step; `forward` then needs the device only."""
        return make_inputs(chunks, self._attention, self._device)

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Compute the batch's KV and the logits that sampling needs.

        Returns:
            `[num_samples, vocab_size]` in the model's dtype: one row per sample point.
        """
        cos_sin = self._rotary.at(inputs.positions)
        hidden = embedding(inputs.tokens, self._embedding)
        for layer in self._layers:
            hidden = layer(hidden, cos_sin, inputs)
        return self._lm_head(self._final_norm(hidden[inputs.sampled_rows]))

    def _layer(self, config: LlamaConfig, index: int, weights: LayerWeights) -> DecoderLayer:
        heads = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)
        qkv, out = make_linear(weights.qkv), make_linear(weights.attention_out)
        return DecoderLayer(
            input_norm=RmsNorm(weights.input_norm, config.rms_norm_eps),
            attention=SelfAttention(index, qkv, out, heads, self._attention),
            mlp_norm=RmsNorm(weights.mlp_norm, config.rms_norm_eps),
            mlp=GatedMlp(make_linear(weights.gate_up), make_linear(weights.mlp_down)),
        )
