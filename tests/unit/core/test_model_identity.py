"""A model's name follows from its content, not from its place."""

from __future__ import annotations

import shutil

import pytest

from kelp.core.errors import ConfigError
from kelp.core.model_identity import model_identity


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
