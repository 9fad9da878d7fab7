"""Turns one GGUF file into a Hugging Face folder with bf16 weights.

The executor then has a single input format. GGUF stores the rows of the Llama family's query and key projections in
the order of llama.cpp's interleaved rotary embedding; they are put back into Hugging Face's half-split order here.
Tensors are dequantised and written one at a time, so the peak is one tensor, not one model. Knows neither torch nor
where the result is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor, dequantize
from numpy.typing import NDArray

from kelp.core.errors import ConfigError
from kelp.text.gguf_tokenizer import build_tokenizer, tokenizer_settings

Say = Callable[[str], None]

_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>[a-z_]+)\.(?P<kind>weight|bias)")
_SAY_EVERY_TENSORS = 100


def read_metadata(reader: GGUFReader) -> dict[str, Any]:
    """All key/value pairs of the file, arrays as lists."""
    return {name: field.contents() for name, field in reader.fields.items()}


def hf_name(gguf_name: str) -> str:
    """Hugging Face name of a tensor.

    Raises:
        ConfigError: A tensor that the supported architectures do not have (experts, rotary scaling, ...).
    """
    found = _TENSOR.fullmatch(gguf_name)
    layer = found.group("layer") if found else None
    names = _TOP_NAMES if layer is None else _LAYER_NAMES
    if found is None or found.group("part") not in names:
        raise ConfigError(f"{gguf_name}: tensor of an unsupported model variant; use the model's Hugging Face folder")
    prefix = "" if layer is None else f"model.layers.{layer}."
    return f"{prefix}{names[found.group('part')]}.{found.group('kind')}"


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


def to_bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 to bfloat16, ties to even; returns the bit patterns."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounding = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return ((bits + rounding) >> 16).astype(np.uint16)


class _Fields:
    """The architecture's own metadata, reached without its prefix."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.architecture = str(metadata.get("general.architecture"))
        if self.architecture not in _ARCHITECTURES:
            raise ConfigError(f"general.architecture: {self.architecture!r} is not one of {', '.join(_ARCHITECTURES)}")
        self._metadata = metadata
        scaling = self.get("rope.scaling.type", "none")
        if scaling != "none":
            raise ConfigError(
                f"{self.architecture}.rope.scaling.type: {scaling!r} is not supported; "
                "use the model's Hugging Face folder"
            )

    def get(self, field: str, default: Any) -> Any:
        return self._metadata.get(f"{self.architecture}.{field}", default)

    def need(self, field: str) -> Any:
        value = self.get(field, None)
        if value is None:
            raise ConfigError(f"{self.architecture}.{field}: missing in the GGUF metadata")
        return value


def model_settings(metadata: Mapping[str, Any], vocab_size: int, is_tied: bool) -> dict[str, Any]:
    """Content of config.json.

    Args:
        metadata: GGUF keys and values.
        vocab_size: Rows of the embedding, which may exceed the vocabulary.
        is_tied: Whether the output projection is the embedding.

    Raises:
        ConfigError: Unsupported architecture or missing field; names it.
    """
    fields = _Fields(metadata)
    model_type, class_name = _ARCHITECTURES[fields.architecture]
    num_heads = int(fields.need("attention.head_count"))
    hidden_size = int(fields.need("embedding_length"))
    head_dim = fields.get("attention.key_length", fields.get("rope.dimension_count", hidden_size // num_heads))
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden_size,
        "intermediate_size": int(fields.need("feed_forward_length")),
        "num_hidden_layers": int(fields.need("block_count")),
        "num_attention_heads": num_heads,
        "num_key_value_heads": int(fields.get("attention.head_count_kv", num_heads)),
        "head_dim": int(head_dim),
        "hidden_act": "silu",
        "max_position_embeddings": int(fields.need("context_length")),
        # GGUF stores float32; six digits give back the decimal that was meant (1e-05).
        "rms_norm_eps": float(f"{fields.need('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(fields.get("rope.freq_base", 10000.0)),
        "attention_bias": False,
        "vocab_size": vocab_size,
        "tie_word_embeddings": is_tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _rotary_heads(name: str, settings: Mapping[str, Any]) -> int:
    """Heads whose rows are interleaved in this tensor; 0 if its rows are in order."""
    if settings["model_type"] != "llama":
        return 0
    if ".attn_q." in name:
        return int(settings["num_attention_heads"])
    return int(settings["num_key_value_heads"]) if ".attn_k." in name else 0


def _values(tensor: ReaderTensor, settings: Mapping[str, Any]) -> NDArray[np.float32]:
    try:
        values: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ConfigError(f"{tensor.name}: cannot dequantise {tensor.tensor_type.name}") from None
    num_heads = _rotary_heads(tensor.name, settings)
    return restore_rotary_order(values, num_heads) if num_heads else values


def _header(tensors: list[ReaderTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        shape = [int(size) for size in reversed(tensor.shape.tolist())]
        end = offset + 2 * int(tensor.n_elements)
        entries[hf_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(entries).encode()
    return encoded + b" " * (-len(encoded) % 8)


def _write_weights(tensors: list[ReaderTensor], settings: Mapping[str, Any], path: Path, say: Say) -> None:
    """Write the safetensors format: header length, JSON header, then the data in header order."""
    header = _header(tensors)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for done, tensor in enumerate(tensors, start=1):
            file.write(to_bf16_bits(_values(tensor, settings)).tobytes())
            if done % _SAY_EVERY_TENSORS == 0:
                say(f"  {done} of {len(tensors)} tensors converted")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _generation_settings(metadata: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    end_ids = sorted({int(metadata[key]) for key in keys if key in metadata})
    roles = {
        "bos_token_id": settings["bos_token_id"],
        "eos_token_id": end_ids[0] if len(end_ids) == 1 else end_ids or None,
        "pad_token_id": settings["pad_token_id"],
    }
    return {role: token_id for role, token_id in roles.items() if token_id is not None}


def convert_gguf(source: Path, target: Path, say: Say) -> None:
    """Write a Hugging Face folder equal to a GGUF file, up to bf16 rounding.

    Args:
        source: The GGUF file.
        target: Existing empty folder; receives config.json, generation_config.json, tokenizer.json,
            tokenizer_config.json, model.safetensors and, if the file has a template, chat_template.jinja.
        say: Receives progress lines.

    Raises:
        ConfigError: Not a GGUF file, or one whose architecture, tokenizer or tensors are not supported.
    """
    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{source}: not a readable GGUF file: {error}") from None
    metadata = read_metadata(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise ConfigError("token_embd.weight: missing in the GGUF file")
    vocab_size = int(tensors["token_embd.weight"].shape[1])
    settings = model_settings(metadata, vocab_size, is_tied="output.weight" not in tensors)
    build_tokenizer(metadata).save(str(target / "tokenizer.json"))
    tokenizer_config = tokenizer_settings(metadata, settings["max_position_embeddings"])
    _write_json(target / "tokenizer_config.json", tokenizer_config)
    if "chat_template" in tokenizer_config:
        (target / "chat_template.jinja").write_text(tokenizer_config["chat_template"], encoding="utf-8")
    _write_json(target / "config.json", settings)
    _write_json(target / "generation_config.json", _generation_settings(metadata, settings))
    _write_weights(list(tensors.values()), settings, target / "model.safetensors", say)
