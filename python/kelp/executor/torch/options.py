"""How one torch executor runs; a plain value, so that this package does not depend on the YAML schema's shape."""

from __future__ import annotations

from dataclasses import dataclass

from kelp.core.config import ExecutorConfig
from kelp.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TorchExecutorOptions:
    """Fields of `core.config.ExecutorConfig` with every automatic value but `num_blocks` resolved.

    Attributes:
        device: `auto`, `cpu` or `cuda:<n>`.
        num_blocks: KV blocks; 0 sizes the pool for `kv_memory_fraction` of free memory.
        max_model_tokens: Prompt plus output; 0 takes the model's own limit.
        threads: CPU threads of the process; 0 leaves torch's setting.
        model_id: Overrides the digest that `KVLayout.model_id` is otherwise made of.
    """

    dtype: str = "bfloat16"
    device: str = "cpu"
    block_size: int = 16
    num_blocks: int = 0
    kv_memory_fraction: float = 0.2
    max_model_tokens: int = 0
    max_step_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 512
    threads: int = 0
    enable_prefix_cache: bool = True
    model_id: str | None = None

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
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            kv_memory_fraction=config.kv_memory_fraction,
            max_model_tokens=config.max_model_tokens,
            max_step_tokens=config.max_step_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            threads=threads,
            enable_prefix_cache=config.enable_prefix_cache,
        )
