"""One step as device tensors: everything that the decoder reads besides weights and KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kelp.executor.torch.attention.base import Attention
from kelp.executor.torch.batch import Chunk


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The batch of one step: the concatenation of its chunks.

    Attributes:
        tokens: `[num_tokens] int64`.
        positions: `[num_tokens] int64`, place of each token in its sequence.
        sampled_rows: `[num_samples] int64`, rows of the batch whose logits are wanted.
        attention: From `Attention.plan`.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    sampled_rows: torch.Tensor
    attention: Any


def make_inputs(chunks: Sequence[Chunk], attention: Attention, device: torch.device) -> StepInputs:
    """Lay a step out."""
    tokens = np.concatenate([chunk.tokens for chunk in chunks])
    positions = np.concatenate([np.arange(chunk.start, chunk.start + len(chunk.tokens)) for chunk in chunks])
    ends = np.cumsum([len(chunk.tokens) for chunk in chunks])
    rows = [np.arange(end - len(chunk.samples), end) for chunk, end in zip(chunks, ends, strict=True)]
    return StepInputs(
        tokens=torch.from_numpy(tokens).long().to(device),
        positions=torch.from_numpy(positions).to(device),
        sampled_rows=torch.from_numpy(np.concatenate(rows)).to(device),
        attention=attention.plan(chunks),
    )
