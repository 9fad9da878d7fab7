"""Configuration: defaults, file, parameters, and every refusal."""

from pathlib import Path

import pytest

from kelp.core.config import CONFIG_ENV, load_config
from kelp.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_config_file(monkeypatch):
    monkeypatch.delenv(CONFIG_ENV, raising=False)


def test_defaults_hold_without_file_and_parameters():
    config = load_config()
    assert config.executor.dtype == "bfloat16"
    assert config.router.disaggregation == "auto"


def test_parameters_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "kelp.yaml"
    path.write_text("executor: {dtype: float32, block_size: 32}\n")
    config = load_config({"executor.block_size": "64"}, path)
    assert (config.executor.dtype, config.executor.block_size) == ("float32", 64)


def test_the_environment_variable_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "kelp.yaml"
    path.write_text("router: {policy: round-robin}\n")
    monkeypatch.setenv(CONFIG_ENV, str(path))
    assert load_config().router.policy == "round-robin"


def test_an_empty_file_is_all_defaults(tmp_path):
    path = tmp_path / "kelp.yaml"
    path.write_text("")
    assert load_config(path=path) == load_config()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"executor.blocks": "3"}, "executor.blocks: no such field"),
        ({"executer.dtype": "float32"}, "executer: no such field"),
        ({"executor.dtype": "int8"}, "executor.dtype: .*bfloat16.*got 'int8'"),
        ({"executor.block_size": "0"}, "executor.block_size: .*greater than or equal to 1"),
        ({"handoff.lease_ttl_s": "-1"}, "handoff.lease_ttl_s: .*greater than 0"),
        ({"server.grpc_port": "70000"}, "server.grpc_port: .*65535"),
        ({"model.lora_adapters": "{a b: /a}"}, "model.lora_adapters.a b"),
        ({"model.lora_adapters.": "/a"}, "model.lora_adapters"),
        ({"model.lora_adapters": "/a"}, "model.lora_adapters: .*dictionary"),
        ({"model.lora_adapters.sql": "3"}, "model.lora_adapters.sql"),
    ],
)
def test_a_bad_field_is_refused_by_name(parameters, message):
    with pytest.raises(ConfigError, match=message):
        load_config(parameters)


@pytest.mark.parametrize(("text", "message"), [("- 1\n", "must be a mapping"), ("a: [\n", "not YAML")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, message):
    path = tmp_path / "kelp.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path=path)


def test_a_missing_file_is_refused_by_the_name_of_the_variable(tmp_path):
    with pytest.raises(ConfigError, match=f"{CONFIG_ENV}=.*No such file"):
        load_config(path=tmp_path / "nowhere.yaml")


def test_the_effective_configuration_survives_its_own_yaml(tmp_path):
    import yaml

    config = load_config({"executor.dtype": "float32", "model.path": str(tmp_path), "model.lora_adapters.sql": "/a"})
    path = tmp_path / "kelp.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path=path) == config


def test_adapters_come_from_the_file_from_dotted_keys_and_from_one_mapping(tmp_path):
    path = tmp_path / "kelp.yaml"
    path.write_text("model: {lora_adapters: {sql: /a/sql, org/chat-v1.2: /a/chat}}\n")
    config = load_config({"model.lora_adapters.sql": "/b/sql"}, path)
    assert config.model.lora_adapters == {"sql": Path("/b/sql"), "org/chat-v1.2": Path("/a/chat")}
    assert load_config({"model.lora_adapters": "{sql: /c}"}).model.lora_adapters == {"sql": Path("/c")}
    assert load_config().model.lora_adapters == {}
