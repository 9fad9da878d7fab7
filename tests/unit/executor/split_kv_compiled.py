"""Compiles the kernels for devices that are not here; run by `test_split_kv` in a process of its own.

The interpreter forgives types that the compiler does not.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kelp.executor.torch.attention import split_kv_kernel as kernels

SHARED_BYTES = 99 * 1024
"""What a program may have on the smallest of the devices that the project means."""

CASES = [
    (80, "bf16", 64, 0, 1, 64),
    (90, "bf16", 128, 128, 8, 16),
    (90, "fp32", 128, 0, 1, 64),
    (80, "bf16", 256, 0, 1, 64),
]
"""Compute capability, dtype, head_dim, window, splits, query rows."""


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, int], capability: int) -> Any:
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    order = list(types)
    source = ASTSource(kernel, types, {(order.index(name),): value for name, value in constants.items()})
    options = {"num_stages": kernels._OPTIONS["num_stages"], "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    for capability, dtype, head_dim, window, num_splits, query_rows in CASES:
        out = "*fp32" if num_splits > 1 else f"*{dtype}"
        pointers = {
            "query": f"*{dtype}",
            "pool": f"*{dtype}",
            "tables": "*i32",
            "tiles": "*i32",
            "out": out,
            "log_sums": out,
        }
        strides = ("value_distance", "block_stride", "table_stride", "query_row_stride", "query_head_stride")
        signature = {**pointers, **dict.fromkeys(strides, "i32"), "scale": "fp32"}
        constants = {
            "WINDOW": window,
            "GROUP": 4,
            "GROUP_PADDED": 4,
            "QUERY_ROWS": query_rows,
            "HEAD_DIM": head_dim,
            "HEAD_DIM_PADDED": head_dim,
            "BLOCK_SIZE": 16,
            "NUM_SPLITS": num_splits,
            "KV_TILE": min(64, kernels._KV_TILE_BYTES // (head_dim * (2 if dtype == "bf16" else 4))),
        }
        binary = compiled(kernels._attend_tiles, signature, constants, capability)
        assert "cubin" in binary.asm
        assert binary.metadata.shared <= SHARED_BYTES, (capability, dtype, head_dim, binary.metadata.shared)
        print(capability, dtype, head_dim, binary.metadata.shared)
    pointers = {"partial": "*fp32", "log_sums": "*fp32", "tiles": "*i32", "out": "*bf16"}
    compiled(kernels._merge_splits, pointers, {"HEAD_DIM": 128, "HEAD_DIM_PADDED": 128, "NUM_SPLITS": 8}, 90)
    pointers = {"key": "*bf16", "value": "*bf16", "pool": "*bf16", "places": "*i32"}
    strides = ("value_distance", "block_stride", "key_row_stride", "key_head_stride")
    signature = {**pointers, **dict.fromkeys((*strides, "value_row_stride", "value_head_stride"), "i32")}
    compiled(kernels._write_rows, signature, {"HEAD_DIM": 128, "HEAD_DIM_PADDED": 128, "BLOCK_SIZE": 16}, 90)


if __name__ == "__main__":
    main()
