"""The compiled operations as functions of tensors. Knows their C signatures; whoever calls keeps the tensors alive."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch

from kelp.executor.torch.native.library import open_library

MAX_HEAD_DIM = 256
MAX_GROUP = 16
"""Query heads per KV head; both as in `kernels.c`."""

_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_TYPES: dict[str, Any] = {"p": _POINTER, "i": _INT, "f": _FLOAT}


class _Shape(ctypes.Structure):
    _fields_ = (
        ("pool", _POINTER),
        ("num_layers", _INT),
        ("num_kv_heads", _INT),
        ("block_size", _INT),
        ("head_dim", _INT),
        ("group", _INT),
        ("scale", _FLOAT),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        ("tables", _POINTER),
        ("row_table", _POINTER),
        ("ends", _POINTER),
        ("num_rows", _INT),
        ("table_stride", _INT),
        ("work", _INT),
        ("num_threads", _INT),
    )


@dataclass(frozen=True, slots=True)
class RowTables:
    """Which KV each query row sees.

    Attributes:
        tables: `[num_tables, max_blocks] int64`, block ids of each sequence.
        row_table: `[num_rows] int64`, the table of each row.
        ends: `[num_rows] int64`, positions below this are seen.
    """

    tables: torch.Tensor
    row_table: torch.Tensor
    ends: torch.Tensor


class PreparedRows:
    """`RowTables` as C reads them."""

    def __init__(self, tables: RowTables, shape: PoolShape) -> None:
        self._tables = tables
        work = int(tables.ends.sum()) * shape.numbers_per_position
        self.plan = _Plan(
            tables.tables.data_ptr(),
            tables.row_table.data_ptr(),
            tables.ends.data_ptr(),
            len(tables.ends),
            tables.tables.shape[1],
            work,
            torch.get_num_threads(),
        )
        self.address = ctypes.addressof(self.plan)


class PoolShape:
    """A pool `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]` bf16 as C reads it."""

    def __init__(self, pool: torch.Tensor, num_heads: int, scale: float) -> None:
        _, num_layers, _, num_kv_heads, block_size, head_dim = pool.shape
        self._pool = pool
        self._shape = _Shape(
            pool.data_ptr(), num_layers, num_kv_heads, block_size, head_dim, num_heads // num_kv_heads, scale
        )
        self.address = ctypes.addressof(self._shape)
        self.numbers_per_position = 2 * num_heads * head_dim


class Kernels:
    """All operations; bf16 tensors on the CPU only, unless they say otherwise."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend = _function(library, "kelp_attend", "ppiipip")
        self._rms_norm = _function(library, "kelp_rms_norm", "pppiifi")
        self._rotate = _function(library, "kelp_rotate", "pppiiiii")
        self._silu_multiply = _function(library, "kelp_silu_multiply", "ppiii")
        self._causal_softmax = _function(library, "kelp_causal_softmax", "ppiiiifi")
        self._greedy = _function(library, "kelp_greedy", "pppiii")

    def attend(
        self, shape: PoolShape, rows: PreparedRows, layer: int, window: int | None, query: torch.Tensor
    ) -> torch.Tensor:
        """`query` `[num_rows, num_heads, head_dim]`, each row dense; returns `[num_rows, num_heads * head_dim]`."""
        assert query.stride()[1:] == (query.shape[2], 1)
        out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        self._attend(shape.address, rows.address, layer, window or 0, query.data_ptr(), query.stride(0), out.data_ptr())
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """`weight * round(x / rms(x))` over the last dimension of a dense `x`."""
        out = torch.empty_like(x)
        size = len(weight)
        self._rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // size,
            size,
            epsilon,
            torch.get_num_threads(),
        )
        return out

    def rotate(self, heads: torch.Tensor, num_rotated: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotate the first heads of a dense `[num_rows, num_heads, head_dim]` in place; see `rotary.rotate`."""
        num_rows, num_heads, head_dim = heads.shape
        self._rotate(
            heads.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            num_rows,
            num_heads * head_dim,
            num_rotated,
            head_dim,
            torch.get_num_threads(),
        )

    def silu_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up` of a dense `[num_rows, 2 * size]`; returns `[num_rows, size]`."""
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(num_rows, size)
        self._silu_multiply(gate_up.data_ptr(), out.data_ptr(), num_rows, size, torch.get_num_threads())
        return out

    def causal_softmax(self, scores: torch.Tensor, num_rows: int, window: int | None, scale: float) -> torch.Tensor:
        """Weights of `num_rows` consecutive tokens of some heads, the last of which sees the last position.

        Args:
            scores: Dense `[num_heads, group * num_rows, num_positions]` fp32; overwritten.
            num_rows: Tokens.
            window: How many latest positions a token sees, itself included; None for all.
            scale: Factor on the scores, above 0.

        Returns:
            The shape of `scores`, bf16, with 0 where nothing is seen.
        """
        weights = torch.empty_like(scores, dtype=torch.bfloat16)
        num_positions = scores.shape[-1]
        self._causal_softmax(
            scores.data_ptr(),
            weights.data_ptr(),
            scores.numel() // num_positions,
            num_rows,
            num_positions,
            window or 0,
            scale,
            torch.get_num_threads(),
        )
        return weights

    def greedy(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first highest token of each dense row `[num_rows, vocab_size]`.

        Returns:
            Ids `[num_rows] int64` and log-probabilities `[num_rows] fp32`.
        """
        num_rows, vocab_size = logits.shape
        ids = torch.empty(num_rows, dtype=torch.int64)
        log_probs = torch.empty(num_rows, dtype=torch.float32)
        self._greedy(
            logits.data_ptr(), ids.data_ptr(), log_probs.data_ptr(), num_rows, vocab_size, torch.get_num_threads()
        )
        return ids, log_probs


def kernels_for(tensor: torch.Tensor) -> Kernels | None:
    """The kernels, if there are any and they can take this tensor."""
    if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    return kernels()


@functools.cache
def kernels() -> Kernels | None:
    """The kernels, compiled at the first call; None where that is impossible."""
    library = open_library()
    return None if library is None else Kernels(library)


def _function(library: ctypes.CDLL, name: str, arguments: str) -> ctypes._NamedFuncPointer:
    """`arguments`: one letter each, p for a pointer, i for an integer, f for a float."""
    function: ctypes._NamedFuncPointer = getattr(library, name)
    function.argtypes = [_TYPES[letter] for letter in arguments]
    function.restype = None
    return function
