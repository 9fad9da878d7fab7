"""One step as device tensors: everything that the decoder reads besides weights and KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kelp.executor.batching.batch import Chunk
from kelp.executor.torch.attention.base import Attention
from kelp.executor.torch.staging import stage


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Rows of the batch that one LoRA adapter computes; `rows` `[num_rows] int64`."""

    name: str
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The batch of one step: the concatenation of its chunks.

    Attributes:
        tokens: `[num_tokens] int64`.
        positions: `[num_tokens] int64`, place of each token in its sequence.
        sampled_rows: `[num_samples] int64`, rows of the batch whose logits are wanted.
        attention: From `Attention.plan`.
        adapters: One entry for each adapter in the batch; None, not empty, without any.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    sampled_rows: torch.Tensor
    attention: Any
    adapters: tuple[AdapterRows, ...] | None = None


def make_inputs(chunks: Sequence[Chunk], attention: Attention, device: torch.device) -> StepInputs:
    """Lay a step out."""
    lengths = [len(chunk.tokens) for chunk in chunks]
    tokens = np.concatenate([chunk.tokens for chunk in chunks])
    starts = np.repeat(np.asarray([chunk.start for chunk in chunks], np.int64), lengths)
    ends = np.cumsum(lengths)
    positions = starts + np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
    num_samples = [len(chunk.samples) for chunk in chunks]
    # Row r of the samples is the last row of its chunk, less the samples of the chunk that follow it.
    following = np.repeat(np.cumsum(num_samples), num_samples) - np.arange(sum(num_samples))
    sampled_rows = np.repeat(ends, num_samples) - following
    return StepInputs(
        tokens=stage(tokens.astype(np.int64), device),
        positions=stage(positions, device),
        sampled_rows=stage(sampled_rows, device),
        attention=attention.plan(chunks),
        adapters=_adapters(chunks, device),
    )


def _adapters(chunks: Sequence[Chunk], device: torch.device) -> tuple[AdapterRows, ...] | None:
    if not any(chunk.lora_name for chunk in chunks):
        return None
    names = np.repeat([chunk.lora_name for chunk in chunks], [len(chunk.tokens) for chunk in chunks])
    return tuple(
        AdapterRows(name, stage(np.flatnonzero(names == name), device))
        for name in dict.fromkeys(chunk.lora_name for chunk in chunks if chunk.lora_name)
    )
