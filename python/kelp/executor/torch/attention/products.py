"""Batched products of bf16 numbers with fp32 results on a CPU.

torch's bf16 product rounds its result to bf16, far too coarse for attention scores. An fp32 product goes to MKL by
default, which is slow on other makers' processors; one that may round its operands to bf16 goes to oneDNN, 2.5 times as
fast here. Queries and keys are bf16 numbers and lose nothing by that.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch


def has_fast_products(tensor: torch.Tensor) -> bool:
    """Whether tensors like this one are multiplied faster here than by torch's fused attention."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and _MATMUL is not None


def fp32_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` of fp32 tensors `[batch, rows, inner]` and `[batch, inner, columns]` that hold bf16 numbers."""
    with _ONE_DNN:
        return torch.bmm(left, right)


_MATMUL: Any = getattr(torch.backends.mkldnn, "matmul", None)
"""The switch, which is the process's; None in a torch that has none yet."""


class _OneDnnProducts:
    """Sends fp32 products to oneDNN while at least one thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._before = ""

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._before, _MATMUL.fp32_precision = _MATMUL.fp32_precision, "bf16"
            self._num_inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                _MATMUL.fp32_precision = self._before


_ONE_DNN = _OneDnnProducts()
