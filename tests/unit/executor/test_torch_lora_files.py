"""Adapters of PEFT folders: what fits the model is loaded, everything else is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import save_model
from tiny_lora import ALL_MODULES, AdaptedModel, adapter, save_mixtral

from kelp.core.errors import ConfigError
from kelp.executor.torch.decoder_parts import load_decoder_parts
from kelp.executor.torch.load import load_parts
from kelp.executor.torch.lora import AdaptedLinear
from kelp.executor.torch.model_config import load_model_config
from kelp.executor.torch.options import TorchExecutorOptions

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft.*")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    folder = tmp_path_factory.mktemp("original")
    return AdaptedModel.save(save_model(folder), folder, {"sql": adapter()})


@pytest.fixture
def broken(original: AdaptedModel, tmp_path: Path) -> Path:
    """A copy of the adapter, for a test to spoil."""
    return shutil.copytree(original.adapters["sql"], tmp_path / "sql")


def load(original: AdaptedModel, folder: Path) -> None:
    load_parts(original.folder, TorchExecutorOptions(num_blocks=8, threads=1, lora_adapters={"sql": folder}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"), ("bias", "all"), ("use_dora", True), ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True), ("layer_replication", [[0, 1]]), ("lora_bias", True), ("target_parameters", ["x"]),
        ("trainable_token_indices", [1]), ("alora_invocation_tokens", [1]), ("init_lora_weights", "pissa"),
        ("target_modules", ["q_proj", "embed_tokens"]), ("target_modules", ["lm_head"]), ("target_modules", 3),
        ("r", 0), ("r", "4"), ("lora_alpha", None), ("use_rslora", "yes"), ("rank_pattern", [4]),
        ("rank_pattern", {"q_proj": 0}), ("alpha_pattern", {"q_proj": "x"}), ("alpha_pattern", {"(": 2}),
    ],
)  # fmt: skip
def test_a_field_that_is_not_supported_is_refused_by_name(original, broken, field, value):
    path = broken / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ConfigError, match=rf"model\.lora_adapters\.sql: {field}"):
        load(original, broken)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_refused_by_its_path(original, broken, name):
    (broken / name).unlink()
    with pytest.raises(ConfigError, match=rf"lora_adapters: .*{name}"):
        load(original, broken)


@pytest.mark.parametrize(
    ("name", "text"), [("adapter_config.json", "{"), ("adapter_config.json", "[]"), ("adapter_model.safetensors", "no")]
)
def test_a_damaged_file_is_refused_by_its_path(original, broken, name, text):
    (broken / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"model\.lora_adapters\.sql: .*{name}"):
        load(original, broken)


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"{Q_PROJ}.lora_A.weight", None, f"{Q_PROJ}.lora_A.weight is missing"),
        (f"{Q_PROJ}.lora_B.weight", None, f"{Q_PROJ}.lora_B.weight is missing"),
        (f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_magnitude_vector", "lora_magnitude_vector is not of a projection"),
        (f"{Q_PROJ}.lora_A.weight", Q_PROJ.replace("0", "2") + ".lora_A.weight", "layers.2.* is not of a projection"),
        (f"{Q_PROJ}.lora_A.weight", "base_model.model.lm_head.lora_A.weight", "lm_head.* is not of a projection"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(original, broken, old, new, message):
    path = broken / "adapter_model.safetensors"
    tensors = load_file(path)
    tensor = tensors.pop(old)
    if new is not None:
        tensors[new] = tensor
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=rf"model\.lora_adapters\.sql: .*{message}"):
        load(original, broken)


def test_a_rank_that_the_tensors_do_not_have_is_refused(original, broken):
    path = broken / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {"q_proj": 2}}))
    with pytest.raises(ConfigError, match=rf"{Q_PROJ}.lora_A.weight is \[4, 48\], rank and model make it \[2, 48\]"):
        load(original, broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_its_tensor(original, broken, value):
    path = broken / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{Q_PROJ}.lora_B.weight"][3, 1] = value
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=rf"lora_adapters\.sql: tensor {Q_PROJ}.lora_B.weight holds values .* finite"):
        load(original, broken)


def test_a_target_without_tensors_is_refused(original, broken):
    path = broken / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "up_proj" not in name}, path)
    with pytest.raises(ConfigError, match="target_modules: holds 'up_proj', of which there is no tensor"):
        load(original, broken)


def test_experts_are_refused(original, tmp_path):
    save_mixtral(tmp_path)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down_proj.* is not of a projection"):
        options = TorchExecutorOptions(num_blocks=8, threads=1, lora_adapters={"sql": original.adapters["sql"]})
        load_parts(tmp_path, options)
    assert "down_proj" in ALL_MODULES


def test_the_content_of_each_adapter_is_told(original):
    limits = original.rig().parts.limits
    assert list(limits.adapters) == ["sql"]
    assert len(bytes.fromhex(limits.adapters["sql"])) == 16


def test_a_linear_that_no_adapter_targets_is_left_alone(tmp_path):
    model = save_model(tmp_path)
    served = AdaptedModel.save(model, tmp_path, {"q": adapter(target_modules=["q_proj"], layers_to_transform=[1])})
    config, cpu = load_model_config(tmp_path), torch.device("cpu")
    layers = load_decoder_parts(tmp_path, config, torch.float32, cpu, lambda *_: None, served.adapters).layers
    is_adapted = [
        isinstance(linear, AdaptedLinear)
        for layer in layers
        for linear in (layer.projections.qkv, layer.projections.out)
    ]
    assert is_adapted == [False, False, True, False]
