"""Seeded random models of every supported family, as transformers makes and saves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 160
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}
_DENSE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral with a window": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows and yarn": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1, "rope_parameters": YARN_ROPE},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-moe": (
        "Qwen3Moe",
        {**_EXPERTS, "num_experts": 6, "norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    ),
    "qwen3-moe without normalised weights": ("Qwen3Moe", {**_EXPERTS, "num_experts": 5, "decoder_sparse_step": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12}),
    "gemma3": (
        "Gemma3",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": GEMMA_ROPES,
        },
    ),
}


def make_model(family: str, **more: Any) -> Any:
    """A model of `FAMILIES`, in fp32, whose every tensor is random and whose log-probs are not all alike."""
    prefix, overrides = FAMILIES[family]
    overrides = {**overrides, **more}
    config_class = getattr(transformers, f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    torch.manual_seed(11)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config_class(**{**_DENSE, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                # Norms start as constants and biases as zeros, which would hide that they were left out.
                parameter.add_(torch.randn_like(parameter) * 0.3)
            if prefix == "Gemma3" and ".post_" in name:
                # Its scaled and tied embeddings would otherwise make every token repeat itself.
                parameter.add_(4.0)
    return model


def save_family(folder: Path, family: str, max_shard_size: str = "5GB") -> Any:
    """Write a model of `FAMILIES` into `folder`."""
    model = make_model(family)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit config.json."""
    path = folder / "config.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@torch.inference_mode()
def reference_answer(model: Any, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of transformers' `generate` and the log-probability of each under the raw logits."""
    answer = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=num_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = answer.sequences[0, len(prompt) :].tolist()
    log_probs = [
        float(torch.log_softmax(logits[0], dim=-1)[token]) for logits, token in zip(answer.logits, tokens, strict=True)
    ]
    return tokens, log_probs
