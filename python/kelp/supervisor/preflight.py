"""Everything that would make a start fail, checked before Triton starts; each refusal is one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil

from kelp.core.config import ExecutorConfig
from kelp.core.errors import ConfigError
from kelp.core.model_identity import adapter_digest
from kelp.core.types import KVLayout
from kelp.supervisor import shm
from kelp.supervisor.plan import MODELS_BESIDE_WORKERS, ServeOptions
from kelp.supervisor.ports import require_free

_PROCESS_BYTES = 400 * 1024 * 1024
"""Resident size of a worker's process without weights and KV: interpreter, torch, transport (measured: 350 MiB)."""
_MOCK_PROCESS_BYTES = 100 * 1024 * 1024
"""The same of a mock's, whose KV is of no account."""


def check(options: ServeOptions) -> None:
    """Refuse what cannot work.

    Raises:
        ConfigError: Names the option, what is wrong and what to do.
    """
    require_free("--http-port", options.host, options.http_port)
    require_free("--grpc-port", options.host, options.grpc_port)
    require_free("--metrics-port", options.host, options.metrics_port)
    for folder in options.config.model.lora_adapters.values():
        adapter_digest(folder)
    num_workers = options.num_prefill + options.num_decode
    num_beside = len(MODELS_BESIDE_WORKERS) + options.config.server.router_instances - 1
    shm.require_room(num_workers + num_beside + int(options.config.kv_manager.enabled))
    executor = options.config.executor
    if executor.engine == "mock":
        _require_memory(_MOCK_PROCESS_BYTES, num_workers)
    elif executor.device in ("auto", "cpu"):
        folder = options.config.model.path
        _require_memory(weight_bytes(folder, executor.dtype) + kv_bytes(folder, executor) + _PROCESS_BYTES, num_workers)


def weight_bytes(folder: Path, dtype: str) -> int:
    """Memory of the weights in `dtype`; files are taken to hold 16-bit values, as nearly all do."""
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return on_disk * (2 if dtype == "float32" else 1)


def kv_bytes(folder: Path, executor: ExecutorConfig) -> int:
    """Memory of one worker's KV pool; 0 when it sizes itself to what is free."""
    model = _config_of(folder)
    try:
        num_heads = int(model["num_attention_heads"])
        layout = KVLayout(
            num_blocks=executor.num_blocks,
            num_layers=int(model["num_hidden_layers"]),
            num_kv_heads=int(model.get("num_key_value_heads") or num_heads),
            block_size=executor.block_size,
            head_dim=int(model.get("head_dim") or model["hidden_size"] // num_heads),
            dtype=executor.dtype,
            model_id="",
        )
    except (KeyError, TypeError, ValueError):
        return 0
    return layout.pool_bytes


def _config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def _require_memory(per_worker: int, num_workers: int) -> None:
    needed, free = per_worker * num_workers, psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"memory: {num_workers} workers need about {needed >> 20} MiB, {free >> 20} MiB are free; "
            "lower --num-blocks, --prefill or --decode, or use --dtype bfloat16"
        )
