"""The key that encrypts blocks at rest: where it comes from. It is never logged, shown or written anywhere."""

from __future__ import annotations

import os

from kelp.core.config_kv import DiskTierConfig
from kelp.core.errors import ConfigError
from kelp.core.kv_manager_messages import SpaceRecord
from kelp.kv.tiers.records import space_digest
from kelp.kv.tiers.sealing import KEY_BYTES, Sealer

_MAX_FILE_BYTES = 4096


def load_key(config: DiskTierConfig) -> bytes | None:
    """The configured key: 32 bytes; None where nothing is encrypted.

    Raises:
        ConfigError: Two keys are named, or the named one is missing or not 32 bytes or 64 hex digits.
    """
    if config.key_file is not None and config.key_variable:
        raise ConfigError("disk_tier.key_file and disk_tier.key_variable: only one of them may name a key")
    if config.key_file is not None:
        try:
            with config.key_file.open("rb") as file:
                raw = file.read(_MAX_FILE_BYTES)
        except OSError as error:
            raise ConfigError(f"disk_tier.key_file: {config.key_file}: {error.strerror}") from None
        return _parse(raw, f"disk_tier.key_file: {config.key_file}")
    if config.key_variable:
        text = os.environ.get(config.key_variable)
        if text is None:
            raise ConfigError(f"disk_tier.key_variable: the environment has no variable {config.key_variable}")
        return _parse(text.encode(), f"disk_tier.key_variable: {config.key_variable}")
    return None


def open_sealer(config: DiskTierConfig, space: SpaceRecord, block_bytes: int) -> Sealer | None:
    """What encrypts the blocks of a space with the configured key; None where nothing is encrypted.

    Raises:
        ConfigError: See `load_key`.
    """
    key = load_key(config)
    return None if key is None else Sealer(key, space_digest(space, block_bytes))


def _parse(raw: bytes, what: str) -> bytes:
    if len(raw) == KEY_BYTES:
        return raw
    digits = raw.strip()
    try:
        key = bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES or len(digits) != 2 * KEY_BYTES:
        raise ConfigError(f"{what}: needs {KEY_BYTES} bytes or {2 * KEY_BYTES} hex digits, it has {len(raw)} bytes")
    return key
