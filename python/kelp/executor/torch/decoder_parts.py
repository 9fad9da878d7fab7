"""A model's weights as the modules that compute with them, not yet bound to a KV pool.

Built layer by layer: a layer's tensors are read, fused and handed to `make_linear`, which may copy them; then the
raw ones are dropped, so that no more than one layer is ever held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kelp.executor.torch.decoder_config import DecoderConfig, ExpertsConfig
from kelp.executor.torch.experts import ExpertsMlp
from kelp.executor.torch.layer import GatedMlp, LayerNorms, Mlp, Projections, QkNorms
from kelp.executor.torch.linear import Linear, make_linear
from kelp.executor.torch.lora import ActiveAdapters
from kelp.executor.torch.lora_files import Adapters, FusedLinear, load_adapters
from kelp.executor.torch.norm import Norm, OffsetRmsNorm, RmsNorm
from kelp.executor.torch.tensor_files import TensorFiles
from kelp.executor.torch.weights import Checkpoint, MlpWeights, Projection

OnProgress = Callable[[int, int], None]
"""Told bytes done and bytes in all, after each part."""


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One layer; `post_norms` is None for families without them."""

    projections: Projections
    mlp: Mlp
    pre_norms: LayerNorms
    post_norms: LayerNorms | None


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """A whole model.

    Attributes:
        embedding: `[vocab_size, hidden_size]`.
        lm_head: Made of `embedding` itself where the model ties them.
        adapters: To be told of each step.
    """

    embedding: torch.Tensor
    layers: tuple[LayerParts, ...]
    final_norm: Norm
    lm_head: Linear
    adapters: ActiveAdapters


def load_decoder_parts(
    folder: Path,
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: OnProgress,
    lora_adapters: Mapping[str, Path] | None = None,
) -> DecoderParts:
    """Load from the safetensors files of a Hugging Face folder.

    Raises:
        ConfigError: A file or tensor is missing, damaged or of another shape than config.json says, or an adapter
            does not fit.
    """
    adapters = load_adapters(lora_adapters or {}, config, dtype, device)
    files = TensorFiles(folder)
    builder = _Builder(Checkpoint(files, config, dtype, device), config, adapters)
    done, total = 0, files.num_bytes
    layers = []
    for index in range(config.num_layers):
        layers.append(builder.layer(index))
        done += files.release()
        on_progress(done, total)
    embedding = builder.checkpoint.embedding()
    parts = DecoderParts(
        embedding=embedding,
        layers=tuple(layers),
        final_norm=builder.norm(builder.checkpoint.final_norm()),
        lm_head=make_linear(embedding if config.has_tied_embeddings else builder.checkpoint.lm_head()),
        adapters=adapters.active,
    )
    files.release()
    # Tensors that no part needs are not read, yet the end is the end.
    on_progress(total, total)
    return parts


class _Builder:
    """Makes modules of a checkpoint's tensors."""

    def __init__(self, checkpoint: Checkpoint, config: DecoderConfig, adapters: Adapters) -> None:
        self.checkpoint = checkpoint
        self._config = config
        self._adapters = adapters

    def norm(self, weight: torch.Tensor) -> Norm:
        kind = OffsetRmsNorm if self._config.has_offset_norms else RmsNorm
        return kind(weight, self._config.rms_norm_eps)

    def layer(self, index: int) -> LayerParts:
        experts = self._config.layers[index].experts
        pre_norms, post_norms = self._layer_norms(index, "input_layernorm", "post_attention_layernorm"), None
        if self._config.has_post_norms:
            pre_norms = self._layer_norms(index, "input_layernorm", "pre_feedforward_layernorm")
            post_norms = self._layer_norms(index, "post_attention_layernorm", "post_feedforward_layernorm")
        return LayerParts(
            projections=Projections(
                qkv=self._adapted(index, FusedLinear.QKV, self.checkpoint.qkv(index)),
                out=self._adapted(index, FusedLinear.ATTENTION_OUT, self.checkpoint.attention_out(index)),
                norms=self._qk_norms(index),
            ),
            mlp=self._experts(index, experts) if experts else self._dense_mlp(index),
            pre_norms=pre_norms,
            post_norms=post_norms,
        )

    def _layer_norms(self, layer: int, attention: str, mlp: str) -> LayerNorms:
        return LayerNorms(*(self.norm(self.checkpoint.layer_norm(layer, name)) for name in (attention, mlp)))

    def _qk_norms(self, layer: int) -> QkNorms | None:
        if not self._config.has_qk_norm:
            return None
        query, key = (self.norm(self.checkpoint.head_norm(layer, name)) for name in ("q_norm", "k_norm"))
        return QkNorms(query, key)

    def _experts(self, layer: int, experts: ExpertsConfig) -> Mlp:
        own = [self._mlp(self.checkpoint.expert(layer, index, experts)) for index in range(experts.num_experts)]
        return ExpertsMlp(self.checkpoint.router(layer, experts), own, experts)

    def _dense_mlp(self, layer: int) -> GatedMlp:
        weights = self.checkpoint.mlp(layer)
        gate_up = self._adapted(layer, FusedLinear.GATE_UP, weights.gate_up)
        return GatedMlp(gate_up, self._adapted(layer, FusedLinear.MLP_DOWN, weights.down), self._config.activation)

    def _adapted(self, layer: int, fused: FusedLinear, projection: Projection) -> Linear:
        return self._adapters.wrap(layer, fused, _linear(projection))

    def _mlp(self, weights: MlpWeights) -> GatedMlp:
        return GatedMlp(_linear(weights.gate_up), _linear(weights.down), self._config.activation)


def _linear(projection: Projection) -> Linear:
    return make_linear(projection.weight, projection.bias)
