"""A model written as GGUF by the rules of llama.cpp's converter answers as transformers does with the original."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_families import LLAMA3_ROPE, make_model, reference_answer
from tiny_llama import Rig, random_prompt

from kelp.core.errors import ConfigError
from kelp.executor.base import Tokens
from kelp.text.gguf_convert import convert_gguf

NUM_TOKENS = 8
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
_GEMMA3 = {
    # What llama.cpp takes for granted: every sixth layer is full, the others' base and the scale are these.
    "num_hidden_layers": 7,
    "layer_types": None,
    "query_pre_attn_scalar": 16,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def _interleave(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    half_split = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return half_split.transpose(1, 2).reshape(rows.shape)


def _split_experts(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """transformers' tensors of all experts under the names that the gguf package knows."""
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            yield name.replace("gate_up_proj", "gate_proj.weight"), gate
            yield name.replace("gate_up_proj", "up_proj.weight"), up
        else:
            yield name if name.endswith((".weight", ".bias")) else f"{name}.weight", tensor


def _stored(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    if config.model_type in ("llama", "mixtral") and ".q_proj." in name:
        return _interleave(tensor, config.num_attention_heads)
    if config.model_type in ("llama", "mixtral") and ".k_proj." in name:
        return _interleave(tensor, config.num_key_value_heads)
    return tensor + 1 if config.model_type == "gemma3_text" and name.endswith("norm.weight") else tensor


def _add_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.model_type in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["full_attention"]["factor"])
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_tokenizer(writer: gguf.GGUFWriter, num_tokens: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["t", "1", *(f"t{index}" for index in range(1, num_tokens - 1))])
    writer.add_token_types([1] * num_tokens)
    writer.add_token_merges(["t 1"])


def _llama3_factors(config: Any) -> np.ndarray:
    """Source: llama.cpp's convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors."""
    rope = config.rope_parameters
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for index in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / config.head_dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(rope["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(factors, np.float32)


def write_gguf(path: Path, model: Any) -> None:
    config = model.config
    architecture = _ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_settings(writer, config)
    _add_tokenizer(writer, config.vocab_size)
    if config.model_type == "llama":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(config))
    for name, tensor in _split_experts(model.state_dict()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = _stored(name, tensor, config).contiguous().numpy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "converted"
    target.mkdir()
    return target


def _made(family: str, **more: Any) -> Any:
    """A model whose weights survive the conversion's bf16 unrounded."""
    torch.set_num_threads(1)
    model = make_model(family, **more)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama with biases", {"mlp_bias": False, "rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 8192}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": False}),
        ("qwen3-moe", {"mlp_only_layers": []}),
        ("mixtral", {}),
        ("gemma3", _GEMMA3),
    ],
)
def test_a_converted_gguf_answers_as_the_model_it_was_made_from(tmp_path, folder, family, more):
    model = _made(family, **more)
    write_gguf(tmp_path / "model.gguf", model)
    convert_gguf(tmp_path / "model.gguf", folder, lambda line: None)
    prompt = random_prompt(5, 50)
    answer = Rig(folder, max_model_tokens=128).answer(prompt, NUM_TOKENS)
    tokens, log_probs = reference_answer(model, prompt, NUM_TOKENS)
    assert answer.tokens == tokens
    assert [value for event in answer.of(Tokens) for value in event.log_probs] == pytest.approx(log_probs, abs=1e-3)


def test_rotary_factors_that_are_not_llama_3s_are_refused(tmp_path, folder):
    model = _made("llama with biases", rope_parameters={**LLAMA3_ROPE, "low_freq_factor": 2.0})
    write_gguf(tmp_path / "model.gguf", model)
    with pytest.raises(ConfigError, match="rope_freqs.weight: not the factors of Llama 3"):
        convert_gguf(tmp_path / "model.gguf", folder, lambda line: None)
