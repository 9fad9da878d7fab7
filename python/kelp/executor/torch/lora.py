"""LoRA while the model runs: what adapters add to the linears they target, in the rows that ask for them.

A linear that no adapter targets is not wrapped at all, and one that is costs nothing in a step without adapters.
Knows neither files nor layers: `lora_files` makes all this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from kelp.executor.torch.inputs import AdapterRows
from kelp.executor.torch.linear import Linear


@dataclass(frozen=True, slots=True)
class LowRank:
    """An adapter's change of one projection, `x @ down.T @ up.T * scaling`: `down` `[rank, in]`, `up` `[out, rank]`."""

    down: torch.Tensor
    up: torch.Tensor
    scaling: float


class Delta:
    """One adapter's change of a linear that several projections are fused into."""

    def __init__(self, parts: Mapping[int, LowRank]) -> None:
        """Args: `parts` by the first output column of their projection; at least one."""
        self._down = torch.cat([part.down for part in parts.values()])
        self._ranks = [len(part.down) for part in parts.values()]
        self._ups = [(start, part.up, part.scaling) for start, part in parts.items()]

    def add_to(self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the change for `rows` `[num_rows] int64` of `x` `[num_tokens, in]` to those of `out`."""
        inner = torch.split(linear(x.index_select(0, rows), self._down), self._ranks, dim=-1)
        for (start, up, scaling), part in zip(self._ups, inner, strict=True):
            out[:, start : start + len(up)].index_add_(0, rows, linear(part, up), alpha=scaling)


class ActiveAdapters:
    """Which rows of the step under way belong to which adapter: set by the decoder, read by its linears.

    Attributes:
        rows: Empty in a step without adapters.
        num_tokens: Rows of the whole batch.
    """

    def __init__(self) -> None:
        self.rows: tuple[AdapterRows, ...] = ()
        self.num_tokens = 0

    def begin(self, rows: tuple[AdapterRows, ...] | None, num_tokens: int) -> None:
        """A step starts."""
        self.rows = rows or ()
        self.num_tokens = num_tokens


class AdaptedLinear:
    """A linear and what each adapter adds to it."""

    def __init__(self, base: Linear, deltas: Mapping[str, Delta], active: ActiveAdapters) -> None:
        """Args: `deltas` by the adapters' names; those that leave this linear alone are missing."""
        self._base = base
        self._deltas = deltas
        self._active = active

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`; `x` is all rows of the step."""
        out = self._base(x)
        for adapter in self._active.rows:
            assert len(x) == self._active.num_tokens
            delta = self._deltas.get(adapter.name)
            if delta is not None:
                delta.add_to(out, x, adapter.rows)
        return out
