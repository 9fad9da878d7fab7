"""Qwen2 and Qwen2.5, Qwen3 dense, Qwen3-MoE."""

from __future__ import annotations

from dataclasses import replace

from kelp.executor.torch.config_fields import ConfigFields
from kelp.executor.torch.decoder_config import DecoderConfig, ExpertsConfig, LayerConfig
from kelp.executor.torch.families.dense import DenseDefaults, equal_layers, read_dense, read_window, sliding_layers
from kelp.executor.torch.rope_config import read_rope

_WINDOW = 4096
_MAX_WINDOW_LAYERS = 28
_QWEN3_HEAD_DIM = 128


def read_qwen2(fields: ConfigFields) -> DecoderConfig:
    """Raises: `ConfigError` naming a field that is missing, malformed or not supported."""
    fields.refuse_unless("hidden_act", "silu")
    fields.refuse_when_set("mlp_bias")
    return replace(read_dense(fields, _windowed_layers(fields), DenseDefaults()), has_qkv_bias=True)


def read_qwen3(fields: ConfigFields) -> DecoderConfig:
    """Raises: `ConfigError` naming a field that is missing, malformed or not supported."""
    fields.refuse_unless("hidden_act", "silu")
    fields.refuse_when_set("mlp_bias")
    return _with_qwen3_attention(
        fields, read_dense(fields, _windowed_layers(fields), DenseDefaults(head_dim=_QWEN3_HEAD_DIM))
    )


def read_qwen3_moe(fields: ConfigFields) -> DecoderConfig:
    """Raises: `ConfigError` naming a field that is missing, malformed or not supported."""
    fields.refuse_unless("hidden_act", "silu")
    fields.refuse_when_set("mlp_bias")
    layers = equal_layers(fields, read_rope(fields), _window(fields))
    experts = ExpertsConfig(
        # transformers 5 writes the second name for the first.
        num_experts=fields.positive_int("num_experts", fields.get("num_local_experts")),
        num_chosen=fields.positive_int("num_experts_per_tok"),
        intermediate_size=fields.positive_int("moe_intermediate_size"),
        is_normalized=fields.flag("norm_topk_prob"),
        is_rounded=True,
    )
    if experts.num_chosen > experts.num_experts:
        raise fields.refusal("num_experts_per_tok", f"is more than the {experts.num_experts} experts")
    step = fields.positive_int("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers", [])
    if not isinstance(dense, list):
        raise fields.refusal("mlp_only_layers", "is not a list of layers")
    sparse = [(index + 1) % step == 0 and index not in dense for index in range(len(layers))]
    mixed = tuple(replace(layer, experts=experts if has else None) for layer, has in zip(layers, sparse, strict=True))
    return _with_qwen3_attention(fields, read_dense(fields, mixed, DenseDefaults()))


def _window(fields: ConfigFields) -> int | None:
    return read_window(fields, _WINDOW) if fields.flag("use_sliding_window") else None


def _windowed_layers(fields: ConfigFields) -> tuple[LayerConfig, ...]:
    rope, window = read_rope(fields), _window(fields)
    first = fields.non_negative_int("max_window_layers", _MAX_WINDOW_LAYERS)
    num_layers = fields.positive_int("num_hidden_layers")
    is_sliding = sliding_layers(fields, [window is not None and index >= first for index in range(num_layers)])
    if any(is_sliding) and window is None:
        raise fields.refusal("layer_types", "has sliding layers, but use_sliding_window or sliding_window is not set")
    return tuple(LayerConfig(rope, window if sliding else None) for sliding in is_sliding)


def _with_qwen3_attention(fields: ConfigFields, config: DecoderConfig) -> DecoderConfig:
    has_bias = fields.flag("attention_bias")
    return replace(config, has_qk_norm=True, has_qkv_bias=has_bias, has_output_bias=has_bias)
