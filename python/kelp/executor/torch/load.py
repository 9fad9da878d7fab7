"""Put a torch executor together from a model folder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kelp.core.clock import Clock, SystemClock
from kelp.core.errors import ConfigError
from kelp.core.model_identity import adapter_digest, model_identity
from kelp.core.types import KVLayout
from kelp.executor.base import ExecutorLimits
from kelp.executor.batching.engine import EngineRules
from kelp.executor.batching.executor import BatchingExecutor, BatchingExecutorParts
from kelp.executor.batching.history import SequenceRules
from kelp.executor.batching.scheduler import SchedulerLimits
from kelp.executor.batching.speculation import SpeculationRules
from kelp.executor.torch.decoder import Decoder
from kelp.executor.torch.decoder_config import DecoderConfig
from kelp.executor.torch.decoder_parts import OnProgress, load_decoder_parts
from kelp.executor.torch.host_memory import keep_freed_memory
from kelp.executor.torch.load_progress import LoadProgress
from kelp.executor.torch.memory import allocate_pool, size_pool
from kelp.executor.torch.model_config import load_model_config
from kelp.executor.torch.options import TorchExecutorOptions
from kelp.executor.torch.runners import NUM_SCRATCH_BLOCKS, make_runner
from kelp.text.grammar import GrammarCompiler

_ROW_COST = {"cpu": 1 / 16, "cuda": 1 / 256}
"""See `SpeculationRules`."""
_MAX_IN_FLIGHT = {"cpu": 1, "cuda": 2}
"""See `EngineRules`; a CPU that computes has no time to plan meanwhile."""


def load_torch_executor(
    model_folder: Path, options: TorchExecutorOptions, clock: Clock | None = None
) -> BatchingExecutor:
    """Load weights, size and allocate the KV pool, start the engine. Takes seconds; sets torch's thread count.

    Raises:
        ConfigError: The model, the options or the machine do not fit together; names the field.
    """
    # OpenMP gives every thread that computes helpers of its own, for as long as it lives, and puts them all to sleep
    # between operations once there are more of them than cores: decoding then takes twice as long.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kelp-load") as short_lived:
        parts = short_lived.submit(load_parts, model_folder, options).result()
    return BatchingExecutor(parts, clock or SystemClock())


def load_parts(
    model_folder: Path, options: TorchExecutorOptions, on_progress: OnProgress | None = None
) -> BatchingExecutorParts:
    """Everything of `load_torch_executor` but the running engine; without `on_progress` a long load is logged.

    Raises:
        ConfigError: See `load_torch_executor`.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    device = _device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    config = load_model_config(model_folder)
    max_model_tokens = _max_model_tokens(config, options)
    model_id = options.model_id or model_identity(model_folder)
    adapter_digests = {name: adapter_digest(folder) for name, folder in options.lora_adapters.items()}
    on_progress = on_progress or LoadProgress(SystemClock())
    dtype = getattr(torch, options.dtype)
    parts = load_decoder_parts(model_folder, config, dtype, device, on_progress, options.lora_adapters)
    layout = size_pool(_layout(config, options, model_id), device, options.kv_memory_fraction)
    pool, memory = allocate_pool(layout, device, NUM_SCRATCH_BLOCKS[device.type])
    decoder = Decoder(config, parts, pool, max_model_tokens, options.attention)
    rules = EngineRules(
        sequence=SequenceRules(options.block_size, config.eos_token_ids),
        scheduler=SchedulerLimits(options.max_step_tokens, options.max_running, options.enable_prefix_cache),
        vocab_size=config.vocab_size,
        speculation=SpeculationRules(options.num_draft_tokens, _ROW_COST[device.type]),
        max_in_flight=_MAX_IN_FLIGHT[device.type],
    )
    return BatchingExecutorParts(
        runner=make_runner(decoder, layout, max_model_tokens, options),
        layout=layout,
        limits=ExecutorLimits(max_model_tokens, config.vocab_size, config.eos_token_ids, adapter_digests),
        memory=memory,
        rules=rules,
        max_waiting=options.max_waiting,
        grammars=GrammarCompiler(model_folder, config.vocab_size, config.eos_token_ids),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"executor.device: {name!r} is no device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"executor.device: {name!r} asked for, but torch finds no CUDA device")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"executor.device: {name!r} is neither cpu nor cuda")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _max_model_tokens(config: DecoderConfig, options: TorchExecutorOptions) -> int:
    limit = config.max_position_embeddings
    if options.max_model_tokens > limit:
        raise ConfigError(
            f"executor.max_model_tokens: {options.max_model_tokens} exceeds max_position_embeddings {limit}"
        )
    return options.max_model_tokens or limit


def _layout(config: DecoderConfig, options: TorchExecutorOptions, model_id: str) -> KVLayout:
    return KVLayout(
        num_blocks=options.num_blocks,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        block_size=options.block_size,
        head_dim=config.head_dim,
        dtype=options.dtype,
        model_id=model_id,
    )
