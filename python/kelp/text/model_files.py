"""Reads the JSON files of a Hugging Face model folder that matter for text.

Knows file names and their shapes, not what a tokenizer or a template does with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kelp.core.errors import ConfigError


def read_json(folder: Path, name: str, is_required: bool = False) -> dict[str, Any]:
    """One JSON object; empty where the file is missing and not required.

    Raises:
        ConfigError: Missing though required, unreadable, or not a JSON object.
    """
    path = folder / name
    if not path.exists() and not is_required:
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model.path={folder}: {name}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"model.path={folder}: {name}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"model.path={folder}: {name}: must be a JSON object")
    return document


def configured_eos_token_ids(folder: Path) -> tuple[int, ...] | None:
    """End-of-sequence ids: generation_config.json's, else config.json's; never those of both together.

    Returns:
        Each id once; None where neither file says any.

    Raises:
        ConfigError: A file is malformed, or its `eos_token_id` is neither a token id nor a list of them.
    """
    for name in ("generation_config.json", "config.json"):
        for part in text_configs(read_json(folder, name)):
            value = part.get("eos_token_id")
            if value is None:
                continue
            token_ids = value if isinstance(value, list) else [value]
            if not all(_is_token_id(token_id) for token_id in token_ids):
                raise ConfigError(
                    f"model.path={folder}: {name}: eos_token_id: {value!r} is neither a token id nor a list of them"
                )
            return tuple(dict.fromkeys(token_ids))
    return None


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def special_token(settings: dict[str, Any], name: str) -> str:
    """Text of `bos_token` and the like in tokenizer_config.json, which writes it as text or as an object."""
    token = settings.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def text_configs(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`config` itself and, for a multimodal model, its language part."""
    yield config
    nested = config.get("text_config")
    if isinstance(nested, dict):
        yield nested


def first_positive_int(config: dict[str, Any], *names: str) -> int:
    """The first of `names` that config.json (or its language part) sets to a positive integer, else 0."""
    for part in text_configs(config):
        for name in names:
            value = part.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return 0
