"""What the torch executor reads from a Hugging Face model folder's JSON, and what it refuses to guess.

Every field that would change the arithmetic is either honoured or refused by name: a model that loads computes
what transformers computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from kelp.executor.torch.config_fields import ConfigFields
from kelp.executor.torch.decoder_config import DecoderConfig
from kelp.executor.torch.families.gemma import read_gemma3
from kelp.executor.torch.families.llama import read_llama, read_mistral
from kelp.executor.torch.families.mixtral import read_mixtral
from kelp.executor.torch.families.qwen import read_qwen2, read_qwen3, read_qwen3_moe
from kelp.text.model_files import read_json
from kelp.text.tokenizer import eos_token_ids

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
    """Read `config.json` of a model folder; its end-of-sequence ids are `text.tokenizer`'s.

    Raises:
        ConfigError: A file is missing or not JSON, or a field is missing, malformed or not supported.
    """
    fields = ConfigFields(read_json(folder, "config.json", is_required=True))
    named = fields.get("architectures")
    read = next((read for name, read in _FAMILIES.items() if named == [name]), None)
    if read is None:
        raise fields.refusal("architectures", f"is not supported, only one of {', '.join(_FAMILIES)}")
    fields.refuse_when_set("quantization_config")
    return replace(read(fields), eos_token_ids=eos_token_ids(folder))
