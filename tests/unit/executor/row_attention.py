"""A backend for graphs that needs neither a device nor a compiler, and a capture that only remembers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from plain_attention import PlainAttention

from kelp.executor.batching.batch import Chunk


@dataclass(frozen=True)
class Rows:
    positions: torch.Tensor
    tables: torch.Tensor


class PlainRowAttention(PlainAttention):
    """Reads positions and tables when it attends, as a replayed graph does."""

    def plan_rows(self, positions: torch.Tensor, tables: torch.Tensor) -> Rows:
        return Rows(positions, tables)

    def attend(self, layer, query, key, value, plan):
        if isinstance(plan, Rows):
            block_size = self.pool.shape[4]
            chunks = []
            for position, table in zip(plan.positions.tolist(), plan.tables.tolist(), strict=True):
                chunks.append(Chunk([0], position, table[: position // block_size + 1]))
            plan = chunks
        return super().attend(layer, query, key, value, plan)


class RememberedCaptures:
    """Replays by computing again; counts what was captured and replayed."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replays = 0

    def __call__(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.num_captured += 1

        def replay() -> torch.Tensor:
            self.num_replays += 1
            return compute()

        return replay
