"""The forward pass for one mixed batch: all tokens of a step through the linears at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import embedding

from kelp.executor.batching.batch import Chunk
from kelp.executor.torch.attention.base import Attention, AttentionShape
from kelp.executor.torch.attention.select import AUTO, choose_attention
from kelp.executor.torch.decoder_config import DecoderConfig
from kelp.executor.torch.decoder_parts import DecoderParts, LayerParts
from kelp.executor.torch.inputs import StepInputs, make_inputs
from kelp.executor.torch.layer import DecoderLayer, HeadShape, PostNormDecoderLayer, SelfAttention
from kelp.executor.torch.rotary import RotarySize, RotaryTable


class Decoder:
    """A model bound to one KV pool. Not thread-safe."""

    def __init__(
        self,
        config: DecoderConfig,
        parts: DecoderParts,
        pool: torch.Tensor,
        max_model_tokens: int,
        attention: str = AUTO,
    ) -> None:
        """Bind.

        Args:
            config: Of the model.
            parts: Its weights.
            pool: As `attention.base` takes it, of the weights' dtype and device.
            max_model_tokens: Positions that sequences may reach.
            attention: Backend; see `attention.select`.

        Raises:
            ConfigError: The backend cannot serve here.
        """
        self._device = pool.device
        windows = tuple(_window(layer.window, max_model_tokens) for layer in config.layers)
        shape = AttentionShape(config.num_heads, config.attention_scale, windows)
        self._attention: Attention = choose_attention(pool, shape, attention)
        ropes = list(dict.fromkeys(layer.rope for layer in config.layers))
        size = RotarySize(min(max_model_tokens, pool.shape[0] * pool.shape[4]), config.head_dim)
        self._rotaries = [RotaryTable(rope, size, pool.dtype, pool.device) for rope in ropes]
        self._rotary_of_layer = [ropes.index(layer.rope) for layer in config.layers]
        self._embedding = parts.embedding
        self._embedding_scale: torch.Tensor | None = None
        if config.embedding_scale is not None:
            self._embedding_scale = torch.tensor(config.embedding_scale).to(pool.device, pool.dtype)
        heads = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)
        self._layers = [self._layer(index, layer, heads) for index, layer in enumerate(parts.layers)]
        self._final_norm = parts.final_norm
        self._lm_head = parts.lm_head
        self._adapters = parts.adapters

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    @property
    def attention(self) -> Attention:
        """The backend that was chosen."""
        return self._attention

    def prepare(self, chunks: Sequence[Chunk]) -> StepInputs:
        """Host work of a step; `forward` then needs the device only."""
        return make_inputs(chunks, self._attention, self._device)

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Compute the batch's KV and the logits that sampling needs.

        Returns:
            `[num_samples, vocab_size]` in the model's dtype: one row per sample point.
        """
        cos_sins = [rotary.at(inputs.positions) for rotary in self._rotaries]
        self._adapters.begin(inputs.adapters, len(inputs.tokens))
        hidden = embedding(inputs.tokens, self._embedding)
        if self._embedding_scale is not None:
            hidden = hidden * self._embedding_scale
        for layer, rotary in zip(self._layers, self._rotary_of_layer, strict=True):
            hidden = layer(hidden, cos_sins[rotary], inputs)
        return self._lm_head(self._final_norm(hidden[inputs.sampled_rows]))

    def _layer(self, index: int, parts: LayerParts, heads: HeadShape) -> DecoderLayer | PostNormDecoderLayer:
        attention = SelfAttention(index, parts.projections, heads, self._attention)
        if parts.post_norms is not None:
            return PostNormDecoderLayer(attention, parts.mlp, parts.pre_norms, parts.post_norms)
        return DecoderLayer(parts.pre_norms.attention, attention, parts.pre_norms.mlp, parts.mlp)


def _window(window: int | None, max_model_tokens: int) -> int | None:
    """A window that no sequence outgrows is none."""
    return None if window is None or window >= max_model_tokens else window
