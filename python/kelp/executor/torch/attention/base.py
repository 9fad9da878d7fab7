"""What the decoder needs of an attention implementation.

A backend plans a step once, on the host, and is then called for each layer with device tensors only, so that the
layers of a step can be captured in a graph or run ahead of the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kelp.executor.batching.batch import Chunk


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What is equal for all steps of a model.

    Attributes:
        num_heads: Query heads; a multiple of the pool's KV heads.
        scale: Factor on query times key.
        windows: Per layer, how many latest positions a token sees, itself included; None sees all.
    """

    num_heads: int
    scale: float
    windows: tuple[int | None, ...]


class Attention(Protocol):
    """Writes and reads one pool `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`."""

    def plan(self, chunks: Sequence[Chunk]) -> Any:
        """What `attend` needs to know of a step whose batch is the concatenation of `chunks`."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Any
    ) -> torch.Tensor:
        """Store this step's K and V of one layer, then attend.

        Args:
            layer: Index of the layer.
            query: `[num_tokens, num_heads, head_dim]`, any strides.
            key: `[num_tokens, num_kv_heads, head_dim]`, any strides.
            value: Like `key`.
            plan: From `plan`, for the same batch.

        Returns:
            `[num_tokens, num_heads * head_dim]`.
        """
