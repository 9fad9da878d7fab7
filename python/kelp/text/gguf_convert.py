"""Turns one GGUF file into a Hugging Face folder with bf16 weights.

The executor then has a single input format. Tensors are dequantised and written one at a time, so the peak is one
tensor, not one model. Knows neither torch nor where the result is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader, ReaderTensor
from tokenizers import Tokenizer

from kelp.core.errors import ConfigError
from kelp.text.gguf_settings import model_family, model_settings
from kelp.text.gguf_tensors import ROPE_FACTORS, hf_tensors, hf_values, llama3_rope, to_bf16_bits
from kelp.text.gguf_tokenizer import adopt_tokenizer, build_tokenizer, tokenizer_settings

Say = Callable[[str], None]

_SAY_EVERY_TENSORS = 100


def read_metadata(reader: GGUFReader) -> dict[str, Any]:
    """All key/value pairs of the file, arrays as lists."""
    return {name: field.contents() for name, field in reader.fields.items()}


def _header(tensors: list[ReaderTensor], family: str) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        for name, shape in hf_tensors(tensor, family):
            end = offset + 2 * math.prod(shape)
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            offset = end
    encoded = json.dumps(entries).encode()
    return encoded + b" " * (-len(encoded) % 8)


@dataclass(frozen=True, slots=True)
class _Model:
    """A GGUF file's tensors, and what they belong to."""

    tensors: list[ReaderTensor]
    family: str
    settings: Mapping[str, Any]


def _write_weights(model: _Model, path: Path, say: Say) -> None:
    """Write the safetensors format: header length, JSON header, then the data in header order."""
    tensors = model.tensors
    header = _header(tensors, model.family)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for done, tensor in enumerate(tensors, start=1):
            file.write(to_bf16_bits(hf_values(tensor, model.family, model.settings)).tobytes())
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


def _tokenizer(metadata: Mapping[str, Any], beside: Path) -> Tokenizer:
    """As the metadata describe it; where that is not understood, the one beside the file."""
    try:
        return build_tokenizer(metadata)
    except ConfigError:
        if not beside.is_file():
            raise
        return adopt_tokenizer(beside, metadata)


def convert_gguf(source: Path, target: Path, say: Say) -> None:
    """Write a Hugging Face folder equal to a GGUF file, up to bf16 rounding.

    Args:
        source: The GGUF file; a tokenizer.json in its folder stands in for a tokenizer that cannot be rebuilt.
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
    if metadata.get("split.count", 1) > 1:
        raise ConfigError(f"split.count: {metadata['split.count']} files make up the model; merge them into one")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise ConfigError("token_embd.weight: missing in the GGUF file")
    vocab_size = int(tensors["token_embd.weight"].shape[1])
    settings = model_settings(metadata, vocab_size, tensors)
    family = model_family(metadata)
    if family == "llama" and ROPE_FACTORS in tensors:
        settings["rope_scaling"] = llama3_rope(tensors.pop(ROPE_FACTORS), settings["rope_theta"])
    _tokenizer(metadata, source.with_name("tokenizer.json")).save(str(target / "tokenizer.json"))
    tokenizer_config = tokenizer_settings(metadata, settings["max_position_embeddings"])
    _write_json(target / "tokenizer_config.json", tokenizer_config)
    if "chat_template" in tokenizer_config:
        (target / "chat_template.jinja").write_text(tokenizer_config["chat_template"], encoding="utf-8")
    _write_json(target / "config.json", settings)
    _write_json(target / "generation_config.json", _generation_settings(metadata, settings))
    _write_weights(_Model(list(tensors.values()), family, settings), target / "model.safetensors", say)
