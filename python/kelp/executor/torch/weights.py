"""Llama weights from safetensors files, in the shape that the forward pass wants them.

Files are memory-mapped; what need not be fused or converted stays a view of the page cache. Tied embeddings are
one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kelp.core.errors import ConfigError
from kelp.executor.torch.model_config import LlamaConfig

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; all projections `[out, in]`.

    Attributes:
        qkv: Query, key and value projections stacked along `out`.
        gate_up: Gate and up projections stacked along `out`.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    attention_out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    mlp_down: torch.Tensor


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """A whole model; `lm_head` is `embedding` itself where the model ties them."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    lm_head: torch.Tensor


def load_weights(folder: Path, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> LlamaWeights:
    """Load from `model.safetensors`, or from the shards of `model.safetensors.index.json`.

    Raises:
        ConfigError: A file or tensor is missing, damaged or of another shape than config.json says.
    """
    with ExitStack() as stack:
        source = _Source(_open_files(folder, stack), dtype, device)
        hidden = config.hidden_size
        embedding = source.get("model.embed_tokens.weight", config.vocab_size, hidden)
        lm_head = embedding
        if not config.has_tied_embeddings:
            lm_head = source.get("lm_head.weight", config.vocab_size, hidden)
        return LlamaWeights(
            embedding=embedding,
            layers=tuple(_layer(source, config, index) for index in range(config.num_layers)),
            final_norm=source.get("model.norm.weight", hidden),
            lm_head=lm_head,
        )


class _Source:
    """Named tensors of all files, checked, converted and placed."""

    def __init__(self, files: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        self._files = files
        self._dtype = dtype
        self._device = device

    def get(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self._files:
            raise ConfigError(f"model.path: tensor {name} is missing")
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ConfigError(f"model.path: tensor {name} is {list(tensor.shape)}, config.json says {list(shape)}")
        return tensor.to(device=self._device, dtype=self._dtype)


def _layer(source: _Source, config: LlamaConfig, index: int) -> LayerWeights:
    prefix = f"model.layers.{index}"
    hidden, inner = config.hidden_size, config.intermediate_size
    query_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    qkv = [
        source.get(f"{prefix}.self_attn.q_proj.weight", query_size, hidden),
        source.get(f"{prefix}.self_attn.k_proj.weight", kv_size, hidden),
        source.get(f"{prefix}.self_attn.v_proj.weight", kv_size, hidden),
    ]
    gate_up = [source.get(f"{prefix}.mlp.{part}_proj.weight", inner, hidden) for part in ("gate", "up")]
    return LayerWeights(
        input_norm=source.get(f"{prefix}.input_layernorm.weight", hidden),
        qkv=torch.cat(qkv),
        attention_out=source.get(f"{prefix}.self_attn.o_proj.weight", hidden, query_size),
        mlp_norm=source.get(f"{prefix}.post_attention_layernorm.weight", hidden),
        gate_up=torch.cat(gate_up),
        mlp_down=source.get(f"{prefix}.mlp.down_proj.weight", hidden, inner),
    )


def _open_files(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Which open file holds each tensor."""
    files: dict[str, Any] = {}
    for name in _file_names(folder):
        try:
            file = stack.enter_context(safe_open(folder / name, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"model.path: {folder / name}: {error}") from None
        files.update(dict.fromkeys(file.keys(), file))
    return files


def _file_names(folder: Path) -> list[str]:
    index = folder / _INDEX
    if not index.exists():
        return ["model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"model.path: {index}: no weight map: {error!r}") from None
    if any(Path(name).name != name for name in names):
        raise ConfigError(f"model.path: {index}: a shard lies outside the folder")
    return names
