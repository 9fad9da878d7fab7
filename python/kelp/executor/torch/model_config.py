"""What the torch executor reads from a Hugging Face `config.json`, and what it refuses to guess.

Every field that would change the arithmetic is either honoured or refused by name: a model that loads computes
what transformers computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kelp.core.errors import ConfigError

_ARCHITECTURE = "LlamaForCausalLM"
_REFUSED_WHEN_SET = ("quantization_config", "attention_bias", "mlp_bias", "sliding_window")


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Shape of a dense Llama-family decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    max_position_embeddings: int
    has_tied_embeddings: bool
    eos_token_ids: tuple[int, ...]


def load_model_config(folder: Path) -> LlamaConfig:
    """Read `config.json` and, for further end-of-sequence ids, `generation_config.json` of a model folder.

    Raises:
        ConfigError: A file is missing or not JSON, or a field is missing, malformed or not supported.
    """
    document = _read_json(folder / "config.json")
    _refuse_unsupported(document)
    num_heads = _positive_int(document, "num_attention_heads")
    hidden_size = _positive_int(document, "hidden_size")
    head_dim = document.get("head_dim") or hidden_size // num_heads
    num_kv_heads = document.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ConfigError(f"num_key_value_heads: {num_kv_heads} does not divide {num_heads} heads")
    rope = _rope_parameters(document)
    return LlamaConfig(
        vocab_size=_positive_int(document, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive_int(document, "intermediate_size"),
        num_layers=_positive_int(document, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(document.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope),
        max_position_embeddings=_positive_int(document, "max_position_embeddings"),
        has_tied_embeddings=bool(document.get("tie_word_embeddings", False)),
        eos_token_ids=_eos_token_ids(folder, document),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"model.path: {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"model.path: {path}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"model.path: {path}: the document must be an object")
    return document


def _refuse_unsupported(document: Mapping[str, Any]) -> None:
    architectures = document.get("architectures")
    if architectures != [_ARCHITECTURE]:
        raise ConfigError(f"architectures: {architectures!r} is not supported, only [{_ARCHITECTURE!r}]")
    if document.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act: {document['hidden_act']!r} is not supported, only 'silu'")
    for field in _REFUSED_WHEN_SET:
        if document.get(field):
            raise ConfigError(f"{field}: {document[field]!r} is not supported")


def _positive_int(document: Mapping[str, Any], field: str) -> int:
    value = document.get(field)
    if not isinstance(value, int) or value <= 0:
        raise ConfigError(f"{field}: {value!r} is not a positive integer")
    return value


def _rope_parameters(document: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings: `rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling`."""
    nested = document.get("rope_parameters") or document.get("rope_scaling") or {}
    if not isinstance(nested, dict):
        raise ConfigError(f"rope_scaling: {nested!r} is not an object")
    outer = {"rope_theta": document["rope_theta"]} if "rope_theta" in document else {}
    return {**outer, **nested}


def _rope_scaling(rope: Mapping[str, Any]) -> Llama3Rope | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor: {rope['partial_rotary_factor']!r} is not supported")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"rope_scaling.rope_type: {kind!r} is not supported, only 'default' and 'llama3'")
    return Llama3Rope(
        factor=_positive_number(rope, "factor"),
        low_freq_factor=_positive_number(rope, "low_freq_factor"),
        high_freq_factor=_positive_number(rope, "high_freq_factor"),
        original_max_position_embeddings=_positive_int(rope, "original_max_position_embeddings"),
    )


def _positive_number(rope: Mapping[str, Any], field: str) -> float:
    value = rope.get(field)
    if not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"rope_scaling.{field}: {value!r} is not a positive number")
    return float(value)


def _eos_token_ids(folder: Path, document: Mapping[str, Any]) -> tuple[int, ...]:
    values = [document.get("eos_token_id")]
    path = folder / "generation_config.json"
    if path.exists():
        values.append(_read_json(path).get("eos_token_id"))
    found: dict[int, None] = {}
    for value in values:
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None:
                found[int(token_id)] = None
    return tuple(found)
