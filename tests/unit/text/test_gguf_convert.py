from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_gguf_tokenizer import _metadata as tokenizer_metadata

from kelp.core.errors import ConfigError
from kelp.text.gguf_convert import convert_gguf
from kelp.text.gguf_settings import model_settings
from kelp.text.gguf_tensors import hf_name, restore_rotary_order, to_bf16_bits
from kelp.text.gguf_tokenizer import build_tokenizer

_HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM, _INNER = 32, 4, 2, 8, 32
MINIMAL = {
    "general.architecture": "llama",
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 32,
}


def _interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    half_split = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return half_split.swapaxes(1, 2).reshape(rows.shape)


def _weights(vocab_size: int, is_tied: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    shapes = {
        "token_embd.weight": (vocab_size, _HIDDEN),
        "output_norm.weight": (_HIDDEN,),
        "blk.0.attn_norm.weight": (_HIDDEN,),
        "blk.0.attn_q.weight": (_HEADS * _HEAD_DIM, _HIDDEN),
        "blk.0.attn_k.weight": (_KV_HEADS * _HEAD_DIM, _HIDDEN),
        "blk.0.attn_v.weight": (_KV_HEADS * _HEAD_DIM, _HIDDEN),
        "blk.0.attn_output.weight": (_HIDDEN, _HEADS * _HEAD_DIM),
        "blk.0.ffn_norm.weight": (_HIDDEN,),
        "blk.0.ffn_gate.weight": (_INNER, _HIDDEN),
        "blk.0.ffn_up.weight": (_INNER, _HIDDEN),
        "blk.0.ffn_down.weight": (_HIDDEN, _INNER),
    }
    if not is_tied:
        shapes["output.weight"] = (vocab_size, _HIDDEN)
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def _write_gguf(
    path: Path, architecture: str = "llama", is_tied: bool = True, quantised: str = "", pre: str = "smollm"
) -> dict[str, np.ndarray]:
    """Write a one-layer model; returns its weights as a Hugging Face model would hold them."""
    metadata = tokenizer_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    weights = _weights(len(tokens), is_tied)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(_HIDDEN)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    for name, values in weights.items():
        stored = values
        if architecture == "llama" and ".attn_q." in name:
            stored = _interleave(values, _HEADS)
        if architecture == "llama" and ".attn_k." in name:
            stored = _interleave(values, _KV_HEADS)
        if name == quantised:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(stored), q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _convert(tmp_path: Path, **options: Any) -> tuple[dict[str, np.ndarray], Path]:
    source, target = tmp_path / "tiny.gguf", tmp_path / "hf"
    target.mkdir()
    weights = _write_gguf(source, **options)
    lines: list[str] = []
    convert_gguf(source, target, lines.append)
    return weights, target


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_every_weight_arrives_under_its_name_in_hugging_face_order(
    tmp_path: Path, architecture: str, is_tied: bool
) -> None:
    weights, target = _convert(tmp_path, architecture=architecture, is_tied=is_tied)
    written = load_file(target / "model.safetensors")
    assert len(written) == len(weights)
    for name, values in weights.items():
        expected = torch.from_numpy(values).to(torch.bfloat16)
        assert torch.equal(written[hf_name(name, architecture)], expected), name
    assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] is is_tied


def test_a_quantised_tensor_is_restored_before_its_rows_are_reordered(tmp_path: Path) -> None:
    weights, target = _convert(tmp_path, quantised="blk.0.attn_q.weight")
    written = load_file(target / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    expected = torch.from_numpy(weights["blk.0.attn_q.weight"])
    assert (written.float() - expected).abs().max().item() < 0.05


def test_transformers_computes_with_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    _, target = _convert(tmp_path)
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = tokenizer("abc 12", return_tensors="pt").input_ids
    assert ids.tolist() == [tokenizer.backend_tokenizer.encode("abc 12").ids]
    with torch.inference_mode():
        logits = loaded(ids).logits
    assert logits.shape == (1, ids.shape[1], len(tokenizer))
    assert torch.isfinite(logits).all()


def test_a_tokenizer_json_beside_the_file_stands_in_for_one_that_is_not_understood(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer.ggml.pre: 'mystery'"):
        _convert(tmp_path, pre="mystery")
    (tmp_path / "hf").rmdir()
    build_tokenizer(tokenizer_metadata()).save(str(tmp_path / "tokenizer.json"))
    _, target = _convert(tmp_path, pre="mystery")
    assert (target / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_the_settings_files_hold_what_the_gguf_says(tmp_path: Path) -> None:
    _, target = _convert(tmp_path)
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100000.0
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert json.loads((target / "generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 0}
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"


def test_rounding_to_bfloat16_equals_torch_for_ties_signs_and_small_numbers() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF808000, 0x00000001, 0x80000000, 0x42F6E979], np.uint32)
    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert to_bf16_bits(values).tolist() == expected.tolist()


def test_restoring_undoes_llama_cpps_interleaving_for_weights_and_biases() -> None:
    rows = np.arange(24 * 3, dtype=np.float32).reshape(24, 3)
    assert np.array_equal(restore_rotary_order(_interleave(rows, 3), 3), rows)
    assert np.array_equal(restore_rotary_order(_interleave(rows[:, 0], 3), 3), rows[:, 0])


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("rope_freqs.weight", "qwen2"),
        ("blk.0.ffn_gate_exps.weight", "llama"),
        ("blk.0.attn_q_norm.weight", "qwen2"),
        ("blk.0.ffn_gate_shexp.weight", "qwen3moe"),
        ("blk.0.mystery.weight", "gemma3"),
    ],
)
def test_a_tensor_of_an_unsupported_variant_is_refused_by_name(name: str, family: str) -> None:
    with pytest.raises(ConfigError, match=name):
        hf_name(name, family)


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"general.architecture": "mamba"}, "general.architecture: 'mamba'"),
        ({**MINIMAL, "llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: 'yarn'"),
        ({"general.architecture": "mixtral"}, "general.architecture: 'mixtral'"),
        ({"general.architecture": "qwen2"}, "qwen2.attention.head_count: missing"),
        ({**MINIMAL, "llama.attention.sliding_window": 64}, "llama.attention.sliding_window: 64"),
        ({**MINIMAL, "llama.rope.dimension_count": 4}, "llama.rope.dimension_count: 4"),
        ({**MINIMAL, "llama.attention.value_length": 4}, "llama.attention.value_length: 4"),
        ({**MINIMAL, "llama.attention.head_count": [4, 2]}, r"llama.attention.head_count: \[4, 2\]"),
        ({**MINIMAL, "llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping: 30.0"),
        ({**MINIMAL, "llama.expert_count": 4}, "llama.expert_used_count: missing"),
        (
            {**MINIMAL, "llama.expert_count": 4, "llama.expert_used_count": 2, "llama.expert_gating_func": 2},
            "llama.expert_gating_func: 2",
        ),
    ],
)
def test_an_unsupported_model_is_refused_by_field(metadata: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        model_settings(metadata, vocab_size=1, tensor_names=())


def test_one_of_several_files_of_a_model_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "part.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="split.count: 3 files"):
        convert_gguf(source, tmp_path, print)


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"GGUF\x03\x00\x00\x00"])
def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "broken.gguf"
    source.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.gguf: not a readable GGUF file"):
        convert_gguf(source, tmp_path, print)
