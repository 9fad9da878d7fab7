"""Tensors of a GGUF file as a Hugging Face checkpoint holds them.

llama.cpp stores the rows of the Llama family's query and key projections in the order of its interleaved rotary
embedding, adds 1 to the weights of Gemma's norms, and keeps all experts of a layer in one tensor; all three are
undone here. Knows neither torch nor where the result is kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import ReaderTensor, dequantize
from numpy.typing import NDArray

from kelp.core.errors import ConfigError

ROPE_FACTORS = "rope_freqs.weight"

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_HEAD_NORM_NAMES = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP_NAMES = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_DENSE_NAMES = {**_ATTENTION_NAMES, **_MLP_NAMES, "ffn_norm": "post_attention_layernorm"}
_LAYER_NAMES: Mapping[str, Mapping[str, str]] = {
    "llama": _DENSE_NAMES,
    "qwen2": _DENSE_NAMES,
    "qwen3": {**_DENSE_NAMES, **_HEAD_NORM_NAMES},
    "mixtral": {
        **_ATTENTION_NAMES,
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    },
    "qwen3moe": {
        **_ATTENTION_NAMES,
        **_HEAD_NORM_NAMES,
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.{}.gate_proj",
        "ffn_up_exps": "mlp.experts.{}.up_proj",
        "ffn_down_exps": "mlp.experts.{}.down_proj",
    },
    "gemma3": {
        **_ATTENTION_NAMES,
        **_HEAD_NORM_NAMES,
        **_MLP_NAMES,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>[a-z_]+)\.(?P<kind>weight|bias)")


def hf_name(gguf_name: str, family: str) -> str:
    """Hugging Face name of a tensor, with `{}` for the number of the expert where it holds all of a layer.

    Raises:
        ConfigError: A tensor that the family does not have.
    """
    found = _TENSOR.fullmatch(gguf_name)
    layer = found.group("layer") if found else None
    names = _TOP_NAMES if layer is None else _LAYER_NAMES[family]
    if found is None or found.group("part") not in names:
        raise ConfigError(f"{gguf_name}: tensor of an unsupported model variant; use the model's Hugging Face folder")
    prefix = "" if layer is None else f"model.layers.{layer}."
    return f"{prefix}{names[found.group('part')]}.{found.group('kind')}"


def hf_tensors(tensor: ReaderTensor, family: str) -> list[tuple[str, list[int]]]:
    """Names and shapes of the tensors that a GGUF tensor becomes, in the order of its values.

    Raises:
        ConfigError: See `hf_name`.
    """
    name = hf_name(tensor.name, family)
    shape = [int(size) for size in reversed(tensor.shape.tolist())]
    if "{}" in name:
        return [(name.format(index), shape[1:]) for index in range(shape[0])]
    return [(name, shape)]


def hf_values(tensor: ReaderTensor, family: str, settings: Mapping[str, Any]) -> NDArray[np.float32]:
    """Values of the tensors of `hf_tensors`, one after the other.

    Args:
        tensor: Of any quantisation that the gguf package can undo.
        family: From `gguf_settings.model_family`.
        settings: Content of config.json.

    Raises:
        ConfigError: A quantisation that it cannot undo; names tensor and type.
    """
    values = _dequantised(tensor)
    num_heads = _rotary_heads(tensor.name, family, settings)
    if num_heads:
        return restore_rotary_order(values, num_heads)
    return values - 1 if family == "gemma3" and tensor.name.endswith("norm.weight") else values


def restore_rotary_order(rows: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's reordering of a query or key projection.

    Args:
        rows: `[num_heads * head_dim, ...]`, each head's rows interleaved (0, d/2, 1, d/2 + 1, ...).
        num_heads: Heads of this projection (key projections have fewer).

    Returns:
        Same shape, each head's rows in half-split order.
    """
    head_dim = rows.shape[0] // num_heads
    pairs = rows.reshape(num_heads, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def llama3_rope(tensor: ReaderTensor, theta: float) -> dict[str, Any]:
    """The rope scaling of Llama 3.1 and later, of which a GGUF file holds only the factor for each frequency.

    Args:
        tensor: `rope_freqs.weight`, `[head_dim / 2]`.
        theta: Base of the rotary embedding.

    Raises:
        ConfigError: The factors are not Llama 3's.
    """
    found = _dequantised(tensor)
    factor, low, high, context = float(found.max()), 1.0, 4.0, 8192
    wavelengths = 2 * math.pi * theta ** (np.arange(len(found)) / len(found))
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ConfigError(f"{tensor.name}: not the factors of Llama 3; use the model's Hugging Face folder")
    return {
        "rope_type": "llama3",
        "factor": round(factor, 3),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def to_bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 to bfloat16, ties to even; returns the bit patterns."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounding = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return ((bits + rounding) >> 16).astype(np.uint16)


def _dequantised(tensor: ReaderTensor) -> NDArray[np.float32]:
    try:
        values: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ConfigError(f"{tensor.name}: cannot dequantise {tensor.tensor_type.name}") from None
    return values


def _rotary_heads(name: str, family: str, settings: Mapping[str, Any]) -> int:
    """Heads whose rows are interleaved in this tensor; 0 if its rows are in order."""
    if family not in ("llama", "mixtral"):
        return 0
    if ".attn_q." in name:
        return int(settings["num_attention_heads"])
    return int(settings["num_key_value_heads"]) if ".attn_k." in name else 0
