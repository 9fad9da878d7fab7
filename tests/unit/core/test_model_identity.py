"""A model's name follows from its content, not from its place."""

from __future__ import annotations

import shutil

import pytest

from kelp.core.errors import ConfigError
from kelp.core.model_identity import adapter_digest, lora_id, model_identity, text_identity


@pytest.fixture
def folder(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "a.safetensors").write_bytes(bytes(100_000))
    return model


def test_the_name_is_128_bits_in_hex_and_survives_a_move(folder, tmp_path):
    before = model_identity(folder)
    assert len(bytes.fromhex(before)) == 16
    assert model_identity(shutil.copytree(folder, tmp_path / "elsewhere")) == before


def test_another_config_is_another_model(folder):
    before = model_identity(folder)
    (folder / "config.json").write_text("{ }")
    assert model_identity(folder) != before


def test_other_weights_of_the_same_size_are_another_model(folder):
    before = model_identity(folder)
    (folder / "a.safetensors").write_bytes(bytes([1]) * 100_000)
    assert model_identity(folder) != before


def test_the_name_and_size_of_a_weight_file_count(folder):
    names = {model_identity(folder)}
    (folder / "a.safetensors").write_bytes(bytes(100_001))
    names.add(model_identity(folder))
    (folder / "a.safetensors").rename(folder / "b.safetensors")
    names.add(model_identity(folder))
    (folder / "c.safetensors").touch()
    names.add(model_identity(folder))
    assert len(names) == 4


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        model_identity(tmp_path)


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(3_000_000))
    return folder


def test_an_adapters_digest_is_128_bits_in_hex_and_survives_a_move(adapter, tmp_path):
    before = adapter_digest(adapter)
    assert len(bytes.fromhex(before)) == 16
    (adapter / "README.md").write_text("the digest is of what is computed with")
    assert adapter_digest(shutil.copytree(adapter, tmp_path / "elsewhere")) == before


@pytest.mark.parametrize("place", [0, 1_234_567, 2_999_999])
def test_any_byte_of_an_adapter_counts(adapter, place):
    before = adapter_digest(adapter)
    weights = bytearray(3_000_000)
    weights[place] = 1
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    assert adapter_digest(adapter) != before


def test_bytes_do_not_move_between_an_adapters_files_unseen(adapter):
    before = adapter_digest(adapter)
    (adapter / "adapter_config.json").write_bytes(b"{}" + bytes(1))
    (adapter / "adapter_model.safetensors").write_bytes(bytes(2_999_999))
    assert adapter_digest(adapter) != before


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapters_files_is_refused(adapter, name):
    (adapter / name).unlink()
    with pytest.raises(ConfigError, match=rf"model.lora_adapters: .*{name}: No such file"):
        adapter_digest(adapter)


def test_an_adapter_is_its_name_and_its_content_and_none_is_neither():
    assert lora_id("", "") == ""
    assert len({lora_id("a", "0"), lora_id("b", "0"), lora_id("a", "1"), ""}) == 4


def test_weights_do_not_count_for_text_and_the_tokenizer_does(folder):
    (folder / "tokenizer.json").write_text("{}")
    before = text_identity(folder)
    next(folder.glob("*.safetensors")).write_bytes(b"other weights")
    assert text_identity(folder) == before
    (folder / "tokenizer.json").write_text('{"model": 1}')
    assert text_identity(folder) != before


def test_another_end_token_is_another_text(folder):
    before = text_identity(folder)
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert text_identity(folder) != before


def test_a_config_that_is_no_json_is_refused_by_name(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json"):
        text_identity(folder)
