"""What the torch executor reads from a Hugging Face model folder's JSON, and what it refuses to guess.

Every field that would change the arithmetic is either honoured or refused by name: a model that loads computes
what transformers computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kelp.core.errors import ConfigError
from kelp.executor.torch.config_fields import ConfigFields
from kelp.executor.torch.decoder_config import DecoderConfig
from kelp.executor.torch.families.gemma import read_gemma3
from kelp.executor.torch.families.llama import read_llama, read_mistral
from kelp.executor.torch.families.mixtral import read_mixtral
from kelp.executor.torch.families.qwen import read_qwen2, read_qwen3, read_qwen3_moe

_FAMILIES: Mapping[str, Callable[[ConfigFields], DecoderConfig]] = {
    "Gemma3ForCausalLM": read_gemma3,
    "LlamaForCausalLM": read_llama,
    "MistralForCausalLM": read_mistral,
    "MixtralForCausalLM": read_mixtral,
    "Qwen2ForCausalLM": read_qwen2,
    "Qwen3ForCausalLM": read_qwen3,
    "Qwen3MoeForCausalLM": read_qwen3_moe,
}


def load_model_config(folder: Path) -> DecoderConfig:
    """Read `config.json` and, for further end-of-sequence ids, `generation_config.json` of a model folder.

    Raises:
        ConfigError: A file is missing or not JSON, or a field is missing, malformed or not supported.
    """
    document = _read_json(folder / "config.json")
    fields = ConfigFields(document)
    architectures = document.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if len(names) != 1 or names[0] not in _FAMILIES:
        raise fields.refusal("architectures", f"is not supported, only one of {', '.join(_FAMILIES)}")
    fields.refuse_when_set("quantization_config")
    return replace(_FAMILIES[names[0]](fields), eos_token_ids=_eos_token_ids(folder, document))


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
