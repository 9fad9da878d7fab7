"""Rotary embeddings as config.json spells them.

Both spellings are read: `rope_parameters` (transformers 5), and `rope_theta` beside `rope_scaling` (before).
"""

from __future__ import annotations

import math

from kelp.executor.torch.config_fields import ConfigFields
from kelp.executor.torch.decoder_config import LinearRope, Llama3Rope, RopeConfig, YarnRope

_Scaling = LinearRope | Llama3Rope | YarnRope | None


def read_rope(fields: ConfigFields, default_theta: float = 10000.0) -> RopeConfig:
    """The one rotary embedding of a model whose layers all share it.

    Raises:
        ConfigError: A field is malformed or not supported; names it.
    """
    fields.refuse_unless("partial_rotary_factor", 1.0)
    nested = fields.nested("rope_scaling") or fields.nested("rope_parameters")
    theta = fields.positive_number("rope_theta", default_theta)
    if nested is None:
        return RopeConfig(theta)
    max_positions = fields.positive_int("max_position_embeddings")
    original = fields.positive_int(
        "original_max_position_embeddings",
        nested.positive_int("original_max_position_embeddings", max_positions),
    )
    return RopeConfig(nested.positive_number("rope_theta", theta), _read_scaling(nested, original, max_positions))


def read_plain_rope(nested: ConfigFields | None, default_theta: float) -> RopeConfig:
    """One of several rotary embeddings; scaled linearly or not at all.

    Raises:
        ConfigError: A field is malformed or not supported; names it.
    """
    if nested is None:
        return RopeConfig(default_theta)
    theta = nested.positive_number("rope_theta", default_theta)
    kind = nested.get("rope_type", nested.get("type", "default"))
    nested.refuse_unless("partial_rotary_factor", 1.0)
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, LinearRope(nested.positive_number("factor")))
    raise nested.refusal(_kind_field(nested), "is not supported, only 'default' and 'linear'")


def _kind_field(nested: ConfigFields) -> str:
    return "rope_type" if "rope_type" in nested else "type"


def _read_scaling(nested: ConfigFields, original: int, max_positions: int) -> _Scaling:
    nested.refuse_unless("partial_rotary_factor", 1.0)
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(nested.positive_number("factor"))
    if kind == "llama3":
        return Llama3Rope(
            factor=nested.positive_number("factor"),
            low_freq_factor=nested.positive_number("low_freq_factor"),
            high_freq_factor=nested.positive_number("high_freq_factor"),
            original_max_position_embeddings=original,
        )
    if kind == "yarn":
        return _read_yarn(nested, original, max_positions)
    raise nested.refusal(_kind_field(nested), "is not supported, only 'default', 'linear', 'llama3' and 'yarn'")


def _read_yarn(nested: ConfigFields, original: int, max_positions: int) -> YarnRope:
    """Source: `_compute_yarn_parameters` of transformers' modeling_rope_utils."""
    factor = nested.positive_number("factor", max_positions / original)
    if "mscale" in nested and "mscale_all_dim" in nested:
        own, all_dimensions = nested.positive_number("mscale"), nested.positive_number("mscale_all_dim")
        inferred = _yarn_magnitude(factor, own) / _yarn_magnitude(factor, all_dimensions)
    else:
        inferred = _yarn_magnitude(factor, 1.0)
    return YarnRope(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=nested.positive_number("beta_fast", 32.0),
        beta_slow=nested.positive_number("beta_slow", 1.0),
        attention_factor=nested.positive_number("attention_factor", inferred),
        is_truncated=nested.flag("truncate", True),
    )


def _yarn_magnitude(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0
