"""What the `adapter_config.json` of a PEFT folder says, and what of it is refused.

Which modules are adapted is told by the tensors themselves (`lora_files`), so `target_modules`,
`layers_to_transform` and the like only have to be consistent with them; what tensors do not tell is honoured here or
refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kelp.core.errors import ConfigError
from kelp.executor.torch.config_fields import ConfigFields

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Last part of the module names that an adapter may target."""

_REFUSED_WHEN_SET = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias",
    "megatron_config", "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
_PLAIN_INITS = (True, False, "eva", "gaussian")
"""Ways to start a training that leave the base model's weights alone; the others store adapters to a changed base."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What turns the tensors of an adapter into arithmetic.

    Attributes:
        targets: Module names that must occur; empty where the config holds a pattern instead.
        ranks: Rank by pattern of the module name, where it is not `rank`.
        alphas: Alpha likewise.
        is_rank_stabilised: Scaling is alpha / sqrt(rank) instead of alpha / rank.
    """

    targets: tuple[str, ...]
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    is_rank_stabilised: bool

    def rank_of(self, module: str) -> int:
        """Rank of a module, named from the base model's root (`model.layers.0.mlp.up_proj`)."""
        return int(_matching(self.ranks, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """Factor on what the adapter adds to that module's output."""
        alpha, rank = _matching(self.alphas, module, self.alpha), self.rank_of(module)
        return alpha / (rank**0.5 if self.is_rank_stabilised else rank)


def load_adapter_config(name: str, folder: Path) -> AdapterConfig:
    """Read `adapter_config.json` of the adapter called `name`.

    Raises:
        ConfigError: The file is missing or not JSON, or a field is missing, malformed or not supported.
    """
    fields = ConfigFields(_read_json(name, folder / "adapter_config.json"), f"model.lora_adapters.{name}: ")
    if fields.get("peft_type") != "LORA":
        raise fields.refusal("peft_type", "is not supported, only 'LORA'")
    fields.refuse_unless("bias", "none")
    fields.refuse_when_set(*_REFUSED_WHEN_SET)
    if fields.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise fields.refusal("init_lora_weights", "is not supported: it belongs to a base model with other weights")
    return AdapterConfig(
        targets=_targets(fields),
        rank=fields.positive_int("r"),
        alpha=fields.positive_number("lora_alpha"),
        ranks={key: inner.positive_int(key) for key, inner in _pattern(name, fields, "rank_pattern")},
        alphas={key: inner.positive_number(key) for key, inner in _pattern(name, fields, "alpha_pattern")},
        is_rank_stabilised=fields.flag("use_rslora"),
    )


def _read_json(name: str, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"model.lora_adapters.{name}: {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"model.lora_adapters.{name}: {path}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"model.lora_adapters.{name}: {path}: the document must be an object")
    return document


def _targets(fields: ConfigFields) -> tuple[str, ...]:
    targets = fields.get("target_modules", [])
    if isinstance(targets, str):
        return ()
    if not isinstance(targets, list) or any(not isinstance(target, str) for target in targets):
        raise fields.refusal("target_modules", "is neither text nor a list of names")
    for target in targets:
        if target.rpartition(".")[2] not in PROJECTIONS:
            raise fields.refusal("target_modules", f"holds {target!r}, which is none of {', '.join(PROJECTIONS)}")
    return tuple(targets)


def _pattern(name: str, fields: ConfigFields, field: str) -> list[tuple[str, ConfigFields]]:
    """The patterns of an object, each with access to its value."""
    document = fields.get(field, {})
    if not isinstance(document, dict):
        raise fields.refusal(field, "is not an object")
    for pattern in document:
        try:
            re.compile(pattern)
        except re.error as error:
            raise fields.refusal(field, f"holds {pattern!r}, which is no regular expression: {error}") from None
    inner = ConfigFields(document, f"model.lora_adapters.{name}: {field}.")
    return [(pattern, inner) for pattern in document]


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the end of the name, as PEFT looks it up."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
