"""Adapters given on the command line of `kelp serve`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kelp.cli.options import effective_config
from kelp.core.config import CONFIG_ENV
from kelp.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_config_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_ENV, raising=False)


def test_adapters_are_absolute_and_join_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "kelp.yaml"
    file.write_text("model: {lora_adapters: {chat: /chat, sql: /old}}\n")
    config = effective_config(file, {"model.path": "/m", "executor.dtype": None}, ["sql=new", "org/v1.2=a=b"], [])
    assert config.model.lora_adapters == {
        "chat": Path("/chat"),
        "sql": tmp_path / "new",
        "org/v1.2": tmp_path / "a=b",
    }


@pytest.mark.parametrize("adapters", [["sql"], ["sql="], ["=/a"], ["a b=/a"], ["sql=/a", "sql=/b"]])
def test_what_is_no_name_with_a_folder_or_comes_twice_is_refused(adapters: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--lora|model\.lora_adapters"):
        effective_config(None, {"model.path": "/m"}, adapters, [])
