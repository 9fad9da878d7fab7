import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as WordTokenizer
from tokenizers import models

from kelp.core.errors import ConfigError
from kelp.executor.torch.decoder_config import Activation, LinearRope, Llama3Rope, RopeConfig, YarnRope
from kelp.executor.torch.model_config import load_model_config
from kelp.text.tokenizer import Tokenizer

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 6,
    "rope_theta": ...,
    "sliding_window": 32,
    "tie_word_embeddings": ...,
}


@pytest.fixture
def write(tmp_path: Path):
    def write_config(**overrides: object) -> Path:
        fields = {**SMOLLM2, **overrides}
        document = {field: value for field, value in fields.items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(document))
        return tmp_path

    return write_config


def test_a_llama_config_is_read(write):
    config = load_model_config(write())
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert {(layer.rope, layer.window, layer.experts) for layer in config.layers} == {(RopeConfig(1e5), None, None)}
    assert config.attention_scale == 0.125
    assert config.has_tied_embeddings
    assert config.eos_token_ids == (2,)


def test_heads_default_to_no_grouping(write):
    assert load_model_config(write(num_key_value_heads=...)).num_kv_heads == 9


def test_both_spellings_of_llama3_rope_scaling_mean_the_same(write):
    scaling = Llama3Rope(8.0, 1.0, 4.0, 8192)
    old = load_model_config(write(rope_scaling=LLAMA3_ROPE))
    new = load_model_config(write(rope_theta=..., rope_parameters={**LLAMA3_ROPE, "rope_theta": 5e5}))
    assert old.layers[0].rope == RopeConfig(1e5, scaling)
    assert new.layers[0].rope == RopeConfig(5e5, scaling)


def test_the_length_a_rope_was_trained_for_defaults_to_the_models_limit(write):
    without = {field: value for field, value in LLAMA3_ROPE.items() if field != "original_max_position_embeddings"}
    config = load_model_config(write(rope_scaling=without, max_position_embeddings=4096))
    assert config.layers[0].rope.scaling.original_max_position_embeddings == 4096


def test_linear_and_yarn_scaling_are_read(write):
    linear = load_model_config(write(rope_scaling={"type": "linear", "factor": 4.0}))
    assert linear.layers[0].rope.scaling == LinearRope(4.0)
    yarn = {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 2048, "truncate": False}
    assert load_model_config(write(rope_scaling=yarn)).layers[0].rope.scaling == YarnRope(
        1.0, 2048, 32.0, 1.0, 1.0, is_truncated=False
    )


def test_biases_of_llama_are_honoured(write):
    config = load_model_config(write(attention_bias=True, mlp_bias=True))
    assert config.has_qkv_bias and config.has_output_bias and config.has_mlp_bias


def test_qwen2_has_biases_and_windows_from_a_layer_on(write):
    qwen2 = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "max_window_layers": 28}
    assert {layer.window for layer in load_model_config(write(**qwen2)).layers} == {None}
    config = load_model_config(write(**qwen2, use_sliding_window=True))
    assert (config.has_qkv_bias, config.has_output_bias, config.has_qk_norm) == (True, False, False)
    assert [layer.window for layer in config.layers] == [None] * 28 + [64] * 2
    config = load_model_config(write(**{**qwen2, "max_window_layers": 0}, use_sliding_window=True))
    assert {layer.window for layer in config.layers} == {64}


def test_qwen3_heads_have_a_size_of_their_own(write):
    qwen3 = {"architectures": ["Qwen3ForCausalLM"]}
    assert load_model_config(write(**qwen3)).head_dim == 128
    config = load_model_config(write(**qwen3, head_dim=80, attention_bias=True))
    assert (config.head_dim, config.has_qk_norm, config.has_qkv_bias, config.has_output_bias) == (80, True, True, True)


def test_qwen3_moe_has_experts_where_the_step_and_the_dense_layers_say(write):
    config = load_model_config(write(**QWEN3_MOE, decoder_sparse_step=2, mlp_only_layers=[3], num_hidden_layers=6))
    assert [layer.experts is not None for layer in config.layers] == [False, True, False, False, False, True]
    experts = config.layers[1].experts
    assert (experts.num_experts, experts.num_chosen, experts.intermediate_size) == (8, 2, 48)
    assert (experts.is_normalized, experts.is_rounded) == (False, True)
    renamed = load_model_config(write(**{**QWEN3_MOE, "num_experts": ..., "num_local_experts": 8}))
    assert renamed.layers[0].experts.num_experts == 8


def test_mixtral_normalises_the_weights_of_its_experts(write):
    config = load_model_config(write(architectures=["MixtralForCausalLM"], num_local_experts=4, rope_theta=...))
    assert config.layers[0].rope.theta == 1e6
    assert (config.layers[0].experts.is_normalized, config.layers[0].experts.is_rounded) == (True, False)


@pytest.mark.parametrize(("given", "window"), [(..., 4096), (None, None), (128, 128)])
def test_mistral_tells_no_window_from_an_unsaid_one(write, given, window):
    config = load_model_config(write(architectures=["MistralForCausalLM"], sliding_window=given))
    assert {layer.window for layer in config.layers} == {window}


def test_both_spellings_of_gemma_3_mean_the_same(write):
    old = write(**GEMMA3, rope_scaling={"rope_type": "linear", "factor": 8.0}, sliding_window_pattern=3)
    first = load_model_config(old)
    by_type = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    second = load_model_config(write(**GEMMA3, rope_parameters=by_type, layer_types=kinds))
    assert first == second
    near, far = RopeConfig(1e4), RopeConfig(1e6, LinearRope(8.0))
    assert [(layer.rope, layer.window) for layer in first.layers] == [(near, 32), (near, 32), (far, None)] * 2


def test_gemma_3_differs_from_llama_in_norms_scales_and_activation(write):
    config = load_model_config(write(**GEMMA3, query_pre_attn_scalar=144))
    assert config.has_qk_norm and config.has_post_norms and config.has_offset_norms and config.has_tied_embeddings
    assert (config.attention_scale, config.embedding_scale, config.head_dim) == (1 / 12, 24.0, 256)
    assert config.activation is Activation.GELU_TANH


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 7, 3]}, [2, 3], (3, 7)),
        ({"eos_token_id": 0}, 2, (0,)),
        ({"temperature": 0.5}, [2, 3], (2, 3)),
        (None, 2, (2,)),
        ({"eos_token_id": []}, 2, ()),
        (None, None, (1,)),
    ],
)
def test_executor_and_router_take_end_ids_from_the_first_file_that_names_some(write, generation, config, expected):
    folder = write(eos_token_id=config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    WordTokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    assert load_model_config(folder).eos_token_ids == expected
    assert Tokenizer(folder).eos_token_ids == expected


def test_a_model_without_end_ids_has_none(write):
    assert load_model_config(write(eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"architectures": ["Phi3ForCausalLM"]}, "architectures: ['Phi3ForCausalLM']"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "architectures: "),
        ({"architectures": ...}, "architectures: None"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"attention_bias": "yes"}, "attention_bias: 'yes'"),
        ({"sliding_window": 4096}, "sliding_window: 4096"),
        ({"layer_types": ["sliding_attention"] * 30}, "layer_types: "),
        ({"quantization_config": {"bits": 4}}, "quantization_config: "),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_scaling.rope_type: 'longrope'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.type: 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: None"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "rope_scaling.truncate: 1"),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": "8"}}, "rope_scaling.factor: '8'"),
        ({"rope_scaling": "llama3"}, "rope_scaling: 'llama3' is not an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor: 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide num_attention_heads 9"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no'"),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "attention_bias: True"),
        ({"architectures": ["MistralForCausalLM"], "num_key_value_heads": ...}, "num_key_value_heads: None"),
        ({"architectures": ["Qwen2ForCausalLM"], "hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 30}, "layer_types: "),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["linear_attention"] * 30}, "layer_types: "),
        ({**QWEN3_MOE, "num_experts_per_tok": 9}, "num_experts_per_tok: 9 is more than the 8 experts"),
        ({**QWEN3_MOE, "mlp_only_layers": 3}, "mlp_only_layers: 3"),
        ({**QWEN3_MOE, "moe_intermediate_size": ...}, "moe_intermediate_size: None"),
        ({**QWEN3_MOE, "layer_types": ["chunked_attention"] * 30}, "layer_types: "),
        ({"architectures": ["MixtralForCausalLM"]}, "num_local_experts: None"),
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 1}, "num_experts_per_tok: "),
        ({**GEMMA3, "final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
        ({**GEMMA3, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        ({**GEMMA3, "hidden_activation": "gelu"}, "hidden_activation: 'gelu'"),
        ({**GEMMA3, "sliding_window": None}, "sliding_window: None"),
        ({**GEMMA3, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type: 'yarn'"),
        ({**GEMMA3, "rope_parameters": {"rope_theta": 1e6}}, "rope_parameters.rope_theta: 1000000.0"),
        ({"vocab_size": ...}, "vocab_size: None"),
        ({"hidden_size": -1}, "hidden_size: -1"),
        ({"head_dim": 63}, "head_dim: 63 is odd"),
        ({"hidden_size": 27}, "head_dim: 3 is odd"),
        ({"architectures": [["x"]]}, "architectures: [['x']]"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: 'LlamaForCausalLM'"),
        ({"architectures": ["Qwen2ForCausalLM"], "max_window_layers": "x"}, "max_window_layers: 'x'"),
        ({"architectures": ["Qwen3ForCausalLM"], "max_window_layers": -1}, "max_window_layers: -1"),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": [["x"]] * 30}, "layer_types: "),
        ({"eos_token_id": "x"}, "config.json: eos_token_id: 'x'"),
        ({"eos_token_id": [2, None]}, "config.json: eos_token_id: [2, None]"),
        ({"eos_token_id": True}, "config.json: eos_token_id: True"),
        ({"eos_token_id": -1}, "config.json: eos_token_id: -1"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_by_name(write, overrides, message):
    with pytest.raises(ConfigError) as refusal:
        load_model_config(write(**overrides))
    assert message in refusal.value.text


def test_a_folder_without_config_or_with_a_broken_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="config.json: No such file"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must be a JSON object"):
        load_model_config(tmp_path)
