"""Gemma 3, text only."""

from __future__ import annotations

from dataclasses import replace

from kelp.executor.torch.config_fields import ConfigFields
from kelp.executor.torch.decoder_config import Activation, DecoderConfig, LayerConfig, RopeConfig
from kelp.executor.torch.families.dense import DenseDefaults, read_dense, read_window, sliding_layers
from kelp.executor.torch.rope_config import read_plain_rope

_WINDOW = 4096
_PATTERN = 6
_HEAD_DIM = 256
_GLOBAL_THETA, _LOCAL_THETA = 1e6, 1e4


def read_gemma3(fields: ConfigFields) -> DecoderConfig:
    """Raises: `ConfigError` naming a field that is missing, malformed or not supported."""
    fields.refuse_unless("hidden_activation", Activation.GELU_TANH.value)
    fields.refuse_when_set(
        "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention", "mlp_bias"
    )
    has_bias = fields.flag("attention_bias")
    defaults = DenseDefaults(head_dim=_HEAD_DIM, has_tied_embeddings=True)
    config = read_dense(fields, _layers(fields), defaults)
    return replace(
        config,
        attention_scale=fields.positive_number("query_pre_attn_scalar", _HEAD_DIM) ** -0.5,
        activation=Activation.GELU_TANH,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        has_qk_norm=True,
        has_post_norms=True,
        has_offset_norms=True,
        embedding_scale=config.hidden_size**0.5,
    )


def _layers(fields: ConfigFields) -> tuple[LayerConfig, ...]:
    """Sliding layers, with every sixth attending to everything and rotating by other angles."""
    pattern = fields.positive_int("sliding_window_pattern", _PATTERN)
    num_layers = fields.positive_int("num_hidden_layers")
    is_sliding = sliding_layers(fields, [(index + 1) % pattern != 0 for index in range(num_layers)])
    window = read_window(fields, _WINDOW)
    if any(is_sliding) and window is None:
        raise fields.refusal("sliding_window", "is not a positive integer, but layers have one")
    far, near = _ropes(fields)
    return tuple(LayerConfig(near, window) if sliding else LayerConfig(far) for sliding in is_sliding)


def _ropes(fields: ConfigFields) -> tuple[RopeConfig, RopeConfig]:
    """For full and for sliding attention: `rope_parameters` per layer type, or the fields of transformers 4."""
    far_theta = fields.positive_number("rope_theta", _GLOBAL_THETA)
    near_theta = fields.positive_number("rope_local_base_freq", _LOCAL_THETA)
    by_type = fields.nested("rope_parameters")
    if by_type is None:
        return read_plain_rope(fields.nested("rope_scaling"), far_theta), RopeConfig(near_theta)
    by_type.refuse_unknown("full_attention", "sliding_attention")
    fields.refuse_when_set("rope_scaling")
    far = read_plain_rope(by_type.nested("full_attention"), far_theta)
    return far, read_plain_rope(by_type.nested("sliding_attention"), near_theta)
