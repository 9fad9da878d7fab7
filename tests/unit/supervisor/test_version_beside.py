"""`kelp scale --version`: what is needed to start workers of another version, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kelp.core.config import load_config
from kelp.core.errors import ConfigError
from kelp.supervisor.plan import worker_model_config, worker_names
from kelp.supervisor.scale import VersionBeside


def test_workers_of_another_version_have_its_name_in_theirs() -> None:
    assert [worker.name for worker in worker_names("decode", 3, "v2")] == ["decode_v2", "decode_v2_1", "decode_v2_2"]
    assert not any(worker.is_on_disk for worker in worker_names("decode", 3, "v2"))


def test_they_are_told_where_it_lies_and_what_it_is_called(tmp_path: Path) -> None:
    (worker,) = worker_names("prefill", 1, "v2")
    config = worker_model_config(worker, VersionBeside("v2", tmp_path).settings())
    assert config["backend"] == "kelp_prefill"
    told = load_config({name: value["string_value"] for name, value in config["parameters"].items()})
    assert (told.model.path, told.model.version) == (tmp_path, "v2")


def test_starting_one_needs_the_folder() -> None:
    with pytest.raises(ConfigError, match="--version v2: where does it lie"):
        VersionBeside("v2", None).settings()


@pytest.mark.parametrize("name", ["V2", "2v", "v_2", "", "v" * 17])
def test_a_version_has_a_plain_name(name: str) -> None:
    with pytest.raises(ConfigError, match="model.version"):
        load_config({"model.version": name})
