"""What the config.json files of all families have in common."""

from __future__ import annotations

from dataclasses import dataclass

from kelp.core.errors import ConfigError
from kelp.executor.torch.config_fields import ConfigFields
from kelp.executor.torch.decoder_config import DecoderConfig, LayerConfig, RopeConfig

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class DenseDefaults:
    """What a family's configuration class in transformers takes for a missing field.

    Attributes:
        head_dim: 0 divides the hidden size among the heads.
        has_kv_heads: Whether `num_key_value_heads` must be given, the class's default being of no use.
    """

    head_dim: int = 0
    has_kv_heads: bool = True
    rms_norm_eps: float = 1e-6
    has_tied_embeddings: bool = False


def read_dense(fields: ConfigFields, layers: tuple[LayerConfig, ...], defaults: DenseDefaults) -> DecoderConfig:
    """A decoder with dense MLPs; families replace what they do otherwise.

    Raises:
        ConfigError: A field is missing, malformed or not supported; names it.
    """
    num_heads = fields.positive_int("num_attention_heads")
    hidden_size = fields.positive_int("hidden_size")
    head_dim = fields.positive_int("head_dim", defaults.head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim: {head_dim} is odd, but rotary embeddings turn pairs")
    return DecoderConfig(
        vocab_size=fields.positive_int("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.positive_int("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(fields, num_heads, defaults.has_kv_heads),
        head_dim=head_dim,
        layers=layers,
        rms_norm_eps=fields.positive_number("rms_norm_eps", defaults.rms_norm_eps),
        attention_scale=head_dim**-0.5,
        max_position_embeddings=fields.positive_int("max_position_embeddings"),
        has_tied_embeddings=fields.flag("tie_word_embeddings", defaults.has_tied_embeddings),
    )


def equal_layers(fields: ConfigFields, rope: RopeConfig, window: int | None = None) -> tuple[LayerConfig, ...]:
    """As many layers as configured, all alike.

    Raises:
        ConfigError: `layer_types` says that they are not.
    """
    layers = (LayerConfig(rope, window),) * fields.positive_int("num_hidden_layers")
    kind = _FULL if window is None else _SLIDING
    if fields.get("layer_types", [kind] * len(layers)) != [kind] * len(layers):
        raise fields.refusal("layer_types", f"is not supported, only {kind!r} for every layer")
    return layers


def sliding_layers(fields: ConfigFields, is_sliding: list[bool]) -> list[bool]:
    """Which layers have a window: as `layer_types` says, else as given.

    Raises:
        ConfigError: `layer_types` is no list of `full_attention` and `sliding_attention`, one per layer.
    """
    known = (_FULL, _SLIDING)
    kinds = fields.get("layer_types", [_SLIDING if sliding else _FULL for sliding in is_sliding])
    if not isinstance(kinds, list) or len(kinds) != len(is_sliding) or not all(kind in known for kind in kinds):
        raise fields.refusal(
            "layer_types", f"is not one of {_FULL!r}, {_SLIDING!r} for each of {len(is_sliding)} layers"
        )
    return [kind == _SLIDING for kind in kinds]


def read_window(fields: ConfigFields, default: int | None = None) -> int | None:
    """`sliding_window`; None where it is null, or missing without a default.

    Raises:
        ConfigError: It is no positive integer.
    """
    if "sliding_window" in fields:
        return fields.positive_int("sliding_window")
    return None if fields.is_null("sliding_window") else default


def _num_kv_heads(fields: ConfigFields, num_heads: int, is_needed: bool) -> int:
    is_given = "num_key_value_heads" in fields or (is_needed and not fields.is_null("num_key_value_heads"))
    count = fields.positive_int("num_key_value_heads") if is_given else num_heads
    if num_heads % count:
        raise ConfigError(f"num_key_value_heads: {count} does not divide num_attention_heads {num_heads}")
    return count
