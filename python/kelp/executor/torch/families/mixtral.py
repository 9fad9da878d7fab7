"""Mixtral."""

from __future__ import annotations

from dataclasses import replace

from kelp.executor.torch.config_fields import ConfigFields
from kelp.executor.torch.decoder_config import DecoderConfig, ExpertsConfig
from kelp.executor.torch.families.dense import DenseDefaults, equal_layers, read_dense, read_window
from kelp.executor.torch.rope_config import read_rope

_DEFAULT_THETA = 1e6


def read_mixtral(fields: ConfigFields) -> DecoderConfig:
    """Raises: `ConfigError` naming a field that is missing, malformed or not supported."""
    fields.refuse_unless("hidden_act", "silu")
    fields.refuse_when_set("attention_bias", "mlp_bias")
    experts = ExpertsConfig(
        num_experts=fields.positive_int("num_local_experts"),
        num_chosen=fields.positive_int("num_experts_per_tok", 2),
        intermediate_size=fields.positive_int("intermediate_size"),
        is_normalized=True,
        is_rounded=False,
    )
    if experts.num_chosen > experts.num_experts:
        raise fields.refusal("num_experts_per_tok", f"is more than the {experts.num_experts} experts")
    layers = equal_layers(fields, read_rope(fields, _DEFAULT_THETA), read_window(fields))
    with_experts = tuple(replace(layer, experts=experts) for layer in layers)
    return read_dense(fields, with_experts, DenseDefaults(rms_norm_eps=1e-5))
