"""Names models and adapters by their content, so that KV of different weights is never taken for one another.

Part of the seed of every block hash and of the handoff layout check; must not depend on where the folder lies.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from kelp.core.errors import ConfigError

_DIGEST_BYTES = 16
_SAMPLES_PER_FILE = 16
_SAMPLE_BYTES = 4096
_READ_BYTES = 1 << 20
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""What a model folder holds that text depends on."""
_TEXT_FIELDS = ("vocab_size", "bos_token_id", "eos_token_id")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What a PEFT folder holds that the arithmetic depends on."""


def _weight_samples(path: Path, num_bytes: int) -> bytes:
    last_start = max(0, num_bytes - _SAMPLE_BYTES)
    starts = sorted({last_start * index // (_SAMPLES_PER_FILE - 1) for index in range(_SAMPLES_PER_FILE)})
    samples = []
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            samples.append(file.read(_SAMPLE_BYTES))
    return b"".join(samples)


def model_identity(model_folder: Path) -> str:
    """Hex digest over config.json and, of each safetensors file, name, size and samples of its content.

    Names and sizes alone would not do: fine-tunes of one model share them. Samples, evenly spaced from the first
    byte to the last, tell them apart without reading gigabytes.

    Raises:
        ConfigError: config.json or a weight file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"kelp-model")
    try:
        fields = [(model_folder / "config.json").read_bytes()]
        for path in sorted(model_folder.glob("*.safetensors")):
            num_bytes = path.stat().st_size
            fields += [path.name.encode(), num_bytes.to_bytes(8, "little"), _weight_samples(path, num_bytes)]
    except OSError as error:
        raise ConfigError(f"model.path={model_folder}: {error.strerror}: {error.filename}") from None
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.hexdigest()


def text_identity(model_folder: Path) -> str:
    """Hex digest over what turns text into tokens and back: versions of a model that share it share a router.

    Raises:
        ConfigError: A file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"kelp-text")
    try:
        config = json.loads((model_folder / "config.json").read_bytes())
        own = json.dumps([config.get(name) for name in _TEXT_FIELDS])
        fields = [own.encode()]
        for name in TEXT_FILES:
            path = model_folder / name
            fields += [name.encode(), path.read_bytes() if path.is_file() else b""]
    except OSError as error:
        raise ConfigError(f"model.path={model_folder}: {error.strerror}: {error.filename}") from None
    except ValueError as error:
        raise ConfigError(f"model.path={model_folder}: config.json: {error}") from None
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.hexdigest()


def adapter_digest(folder: Path) -> str:
    """Hex digest over everything in the two files of a PEFT folder; they are small enough to be read whole.

    Raises:
        ConfigError: One of them cannot be read.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"kelp-adapter")
    try:
        for name in ADAPTER_FILES:
            with (folder / name).open("rb") as file:
                digest.update((folder / name).stat().st_size.to_bytes(8, "little"))
                while chunk := file.read(_READ_BYTES):
                    digest.update(chunk)
    except OSError as error:
        raise ConfigError(f"model.lora_adapters: {error.filename}: {error.strerror}") from None
    return digest.hexdigest()


def lora_id(name: str, digest: str) -> str:
    """What `core.hashing.seed_hash` takes for an adapter; empty without one."""
    return f"{name}@{digest}" if name else ""
