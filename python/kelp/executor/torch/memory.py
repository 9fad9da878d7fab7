"""Size and memory of the KV pool.

The pool is plain, page-aligned memory, because a transport registers whole pages. It starts as zeros: attention
multiplies masked positions by 0, and 0 times the NaN of uninitialised memory is NaN.
"""

from __future__ import annotations

from dataclasses import replace

import psutil
import torch

from kelp.core.errors import ConfigError
from kelp.core.types import KVLayout
from kelp.executor.base import PoolMemory
from kelp.executor.torch.host_memory import prefer_huge_pages

_PAGE_BYTES = 4096
_MAX_AUTO_BLOCKS_CPU = 4096


def size_pool(layout: KVLayout, device: torch.device, memory_fraction: float) -> KVLayout:
    """`layout` with a definite `num_blocks` that fits into free memory.

    Args:
        layout: `num_blocks` 0 asks for `memory_fraction` of free memory, 4096 blocks at most on CPU.
        device: Where the pool will live.
        memory_fraction: Between 0 and 1; used for automatic sizing only.

    Raises:
        ConfigError: The blocks do not fit; names `executor.num_blocks` and both sizes.
    """
    free_bytes = _free_bytes(device)
    num_blocks = layout.num_blocks
    if num_blocks == 0:
        num_blocks = int(free_bytes * memory_fraction) // layout.block_bytes
        if device.type == "cpu":
            num_blocks = min(num_blocks, _MAX_AUTO_BLOCKS_CPU)
    sized = replace(layout, num_blocks=num_blocks)
    if num_blocks < 1 or sized.pool_bytes > free_bytes:
        raise ConfigError(
            f"executor.num_blocks: {num_blocks} blocks of {layout.block_bytes} bytes do not fit into "
            f"{free_bytes} free bytes on {device}"
        )
    return sized


def allocate_pool(
    layout: KVLayout, device: torch.device, num_scratch_blocks: int = 0
) -> tuple[torch.Tensor, PoolMemory]:
    """Zeroed pool `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]` and its description.

    Scratch blocks follow the layout's in the tensor; the description leaves them out, so that no peer sees them.

    Raises:
        ConfigError: The allocation failed; names `executor.num_blocks`.
    """
    num_blocks = layout.num_blocks + num_scratch_blocks
    num_bytes = num_blocks * layout.block_bytes
    try:
        raw = torch.empty(num_bytes + _PAGE_BYTES, dtype=torch.uint8, device=device)
        prefer_huge_pages(raw)
        raw.zero_()
    except RuntimeError as error:
        raise ConfigError(f"executor.num_blocks: {num_bytes} bytes on {device}: {error}") from None
    skipped = -raw.data_ptr() % _PAGE_BYTES
    flat = raw[skipped : skipped + num_bytes].view(getattr(torch, layout.dtype))
    pool = flat.view(num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
    return pool, PoolMemory(pool.data_ptr(), layout.pool_bytes, str(device), pool[: layout.num_blocks])


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
