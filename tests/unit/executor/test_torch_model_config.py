import json
from pathlib import Path

import pytest

from kelp.core.errors import ConfigError
from kelp.executor.torch.model_config import Llama3Rope, load_model_config

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
    assert config.rope_theta == 100000.0
    assert config.rope_scaling is None
    assert config.has_tied_embeddings
    assert config.eos_token_ids == (2,)


def test_heads_default_to_no_grouping(write):
    assert load_model_config(write(num_key_value_heads=...)).num_kv_heads == 9


def test_both_spellings_of_llama3_rope_scaling_mean_the_same(write):
    expected = Llama3Rope(8.0, 1.0, 4.0, 8192)
    old = load_model_config(write(rope_scaling=LLAMA3_ROPE))
    new = load_model_config(write(rope_theta=..., rope_parameters={**LLAMA3_ROPE, "rope_theta": 5e5}))
    assert old.rope_scaling == new.rope_scaling == expected
    assert (old.rope_theta, new.rope_theta) == (100000.0, 5e5)


def test_end_ids_of_the_generation_config_are_added(write):
    folder = write(eos_token_id=[2, 3])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    assert load_model_config(folder).eos_token_ids == (2, 3, 7)


def test_a_model_without_end_ids_has_none(write):
    assert load_model_config(write(eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures: "),
        ({"architectures": ...}, "architectures: None"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"attention_bias": True}, "attention_bias: True"),
        ({"mlp_bias": True}, "mlp_bias: True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: "),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type: 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.rope_type: 'linear'"),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": "8"}}, "rope_scaling.factor: '8'"),
        ({"rope_scaling": "llama3"}, "rope_scaling: 'llama3' is not an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide 9"),
        ({"vocab_size": ...}, "vocab_size: None"),
        ({"hidden_size": -1}, "hidden_size: -1"),
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
    with pytest.raises(ConfigError, match="must be an object"):
        load_model_config(tmp_path)
