"""Llama (SmolLM2 included) and Mistral."""

from __future__ import annotations

from dataclasses import replace

from kelp.executor.torch.config_fields import ConfigFields
from kelp.executor.torch.decoder_config import DecoderConfig
from kelp.executor.torch.families.dense import DenseDefaults, equal_layers, read_dense, read_window
from kelp.executor.torch.rope_config import read_rope

_MISTRAL_WINDOW = 4096


def read_llama(fields: ConfigFields) -> DecoderConfig:
    """Raises: `ConfigError` naming a field that is missing, malformed or not supported."""
    fields.refuse_unless("hidden_act", "silu")
    fields.refuse_when_set("sliding_window")
    layers = equal_layers(fields, read_rope(fields))
    has_attention_bias = fields.flag("attention_bias")
    return replace(
        read_dense(fields, layers, DenseDefaults(has_kv_heads=False)),
        has_qkv_bias=has_attention_bias,
        has_output_bias=has_attention_bias,
        has_mlp_bias=fields.flag("mlp_bias"),
    )


def read_mistral(fields: ConfigFields) -> DecoderConfig:
    """Raises: `ConfigError` naming a field that is missing, malformed or not supported."""
    fields.refuse_unless("hidden_act", "silu")
    fields.refuse_when_set("attention_bias", "mlp_bias")
    layers = equal_layers(fields, read_rope(fields), read_window(fields, _MISTRAL_WINDOW))
    return read_dense(fields, layers, DenseDefaults())
