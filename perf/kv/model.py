"""The served model's KV."""

from __future__ import annotations

import json
from pathlib import Path

from kelp.core.config import ModelConfig
from kelp.core.types import KVLayout
from perf.suite import BenchError

BLOCK_SIZE = 16


def model_folder() -> Path:
    """Of the default model.

    Raises:
        BenchError: It is not there.
    """
    folder = ModelConfig().path
    if not (folder / "config.json").is_file():
        raise BenchError(f"{folder}: no model here; run `make setup`")
    return folder


def vocabulary_size() -> int:
    """Token ids of the default model, special ones first."""
    return int(json.loads((model_folder() / "config.json").read_text())["vocab_size"])


def block_bytes(folder: Path) -> int:
    """Bytes of one KV block in bf16."""
    config = json.loads((folder / "config.json").read_text())
    layout = KVLayout(
        num_blocks=1,
        num_layers=config["num_hidden_layers"],
        num_kv_heads=config["num_key_value_heads"],
        block_size=BLOCK_SIZE,
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        dtype="bfloat16",
        model_id="",
    )
    return layout.block_bytes
