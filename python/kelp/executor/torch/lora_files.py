"""LoRA adapters from PEFT folders, checked against the model and fused like its own linears.

Which modules are adapted is what the tensors' names say; a tensor that is not a low-rank change of one of the
decoder's projections is refused, so that an adapter that loads computes what PEFT computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kelp.core.errors import ConfigError
from kelp.executor.torch.decoder_config import DecoderConfig
from kelp.executor.torch.linear import Linear
from kelp.executor.torch.lora import ActiveAdapters, AdaptedLinear, Delta, LowRank
from kelp.executor.torch.lora_config import AdapterConfig, load_adapter_config

_TENSOR = re.compile(r"base_model\.model\.(model\.layers\.(\d+)\.((?:self_attn|mlp)\.\w+_proj))\.lora_([AB])\.weight")


class FusedLinear(Enum):
    """A linear of a layer: the projections that it is the stack of, in order."""

    QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    ATTENTION_OUT = ("self_attn.o_proj",)
    GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
    MLP_DOWN = ("mlp.down_proj",)


class Adapters:
    """All adapters of one model.

    Attributes:
        active: To be told of each step.
    """

    def __init__(self, config: DecoderConfig, modules: Mapping[str, Mapping[str, LowRank]]) -> None:
        """Args: `modules` of each adapter by the module's name in the base model."""
        self.active = ActiveAdapters()
        self._config = config
        self._modules = modules

    def wrap(self, layer: int, fused: FusedLinear, base: Linear) -> Linear:
        """`base` with what adapters add to it; `base` itself if they leave it alone."""
        shapes = _shapes(self._config, layer)
        deltas = {}
        for name, modules in self._modules.items():
            parts, start = {}, 0
            for projection in fused.value:
                part = modules.get(f"model.layers.{layer}.{projection}")
                if part is not None:
                    parts[start] = part
                start += shapes[projection][0]
            if parts:
                deltas[name] = Delta(parts)
        return AdaptedLinear(base, deltas, self.active) if deltas else base


def load_adapters(
    folders: Mapping[str, Path], config: DecoderConfig, dtype: torch.dtype, device: torch.device
) -> Adapters:
    """Load all adapters.

    Args:
        folders: PEFT folders by the adapters' names.
        config: The model that they belong to.
        dtype: The model's, in which the adapters compute as well.
        device: Where the model is.

    Raises:
        ConfigError: A file is missing or damaged, or holds what this model or executor does not have; names the
            adapter and the field or tensor.
    """
    reader = _Reader(config, dtype, device)
    return Adapters(config, {name: reader.read(name, folder) for name, folder in folders.items()})


class _Reader:
    """Reads adapters of one model."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._dtype = dtype
        self._device = device

    def read(self, name: str, folder: Path) -> dict[str, LowRank]:
        """The low-rank changes of one adapter by module."""
        where = f"model.lora_adapters.{name}"
        adapter = load_adapter_config(name, folder)
        path = folder / "adapter_model.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                modules = self._modules(where, list(file.keys()))
                _require_targets(where, adapter, modules)
                return {module: self._low_rank(where, file, adapter, module) for module in modules}
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{where}: {path}: {error}") from None

    def _modules(self, where: str, keys: list[str]) -> list[str]:
        """The adapted modules; every tensor belongs to one, and every one has both of its tensors."""
        sides: dict[str, str] = {}
        for key in sorted(keys):
            match = _TENSOR.fullmatch(key)
            if match is None or match[3] not in _shapes(self._config, int(match[2])):
                raise ConfigError(
                    f"{where}: tensor {key} is not of a projection that this model has and adapters may change"
                )
            sides[match[1]] = sides.get(match[1], "") + match[4]
        for module, found in sides.items():
            if found != "AB":
                missing = "B" if found == "A" else "A"
                raise ConfigError(f"{where}: tensor base_model.model.{module}.lora_{missing}.weight is missing")
        return list(sides)

    def _low_rank(self, where: str, file: Any, adapter: AdapterConfig, module: str) -> LowRank:
        layer, projection = module.removeprefix("model.layers.").split(".", 1)
        num_out, num_in = _shapes(self._config, int(layer))[projection]
        rank = adapter.rank_of(module)
        sides = []
        for side, shape in (("A", [rank, num_in]), ("B", [num_out, rank])):
            key = f"base_model.model.{module}.lora_{side}.weight"
            tensor: torch.Tensor = file.get_tensor(key)
            if list(tensor.shape) != shape:
                raise ConfigError(f"{where}: tensor {key} is {list(tensor.shape)}, rank and model make it {shape}")
            side_in_use = tensor.to(device=self._device, dtype=self._dtype)
            if not bool(side_in_use.isfinite().all()):
                raise ConfigError(f"{where}: tensor {key} holds values that are not finite in {self._dtype}")
            sides.append(side_in_use)
        return LowRank(sides[0], sides[1], adapter.scaling_of(module))


def _require_targets(where: str, adapter: AdapterConfig, modules: list[str]) -> None:
    if not modules:
        raise ConfigError(f"{where}: adapter_model.safetensors holds no tensors")
    for target in adapter.targets:
        if not any(f".{module}".endswith(f".{target}") for module in modules):
            raise ConfigError(f"{where}: target_modules: holds {target!r}, of which there is no tensor")


def _shapes(config: DecoderConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of each projection of a layer that may be adapted; none beyond the last layer."""
    if layer >= config.num_layers:
        return {}
    hidden, inner = config.hidden_size, config.intermediate_size
    query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (query_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, query_size),
    }
    if config.layers[layer].experts is None:
        shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    return shapes
