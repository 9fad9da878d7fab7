"""How one torch executor runs; a plain value, so that this package does not depend on the YAML schema's shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kelp.core.config import ExecutorConfig
from kelp.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TorchExecutorOptions:
    """Fields of `core.config.ExecutorConfig` with every automatic value but `num_blocks` resolved.

    Attributes:
        device: `auto`, `cpu` or `cuda:<n>`.
        attention: Backend; see `attention.select`.
        num_blocks: KV blocks; 0 sizes the pool for `kv_memory_fraction` of free memory.
        max_model_tokens: Prompt plus output; 0 takes the model's own limit.
        threads: CPU threads of the process; 0 leaves torch's setting.
        model_id: Overrides the digest that `KVLayout.model_id` is otherwise made of.
        lora_adapters: PEFT folders by the names that requests may give.
    """

    dtype: str = "bfloat16"
    device: str = "cpu"
    attention: str = "auto"
    enable_cuda_graphs: bool = True
    block_size: int = 16
    num_blocks: int = 0
    kv_memory_fraction: float = 0.2
    max_model_tokens: int = 0
    max_step_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 512
    threads: int = 0
    enable_prefix_cache: bool = True
    num_draft_tokens: int = 8
    model_id: str | None = None
    lora_adapters: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"executor.dtype: {self.dtype!r} is neither bfloat16 nor float32")
        if self.max_step_tokens < self.max_running:
            raise ConfigError(
                f"executor.max_step_tokens: {self.max_step_tokens} is below executor.max_running "
                f"{self.max_running}; a step must hold one token of every running sequence"
            )

    @classmethod
    def from_config(cls, config: ExecutorConfig, device: str, threads: int) -> TorchExecutorOptions:
        """Options as configured, on the device and threads that the caller has resolved."""
        return cls(
            dtype=config.dtype,
            device=device,
            attention=config.attention,
            enable_cuda_graphs=config.enable_cuda_graphs,
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            kv_memory_fraction=config.kv_memory_fraction,
            max_model_tokens=config.max_model_tokens,
            max_step_tokens=config.max_step_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            threads=threads,
            enable_prefix_cache=config.enable_prefix_cache,
            num_draft_tokens=config.num_draft_tokens,
        )
