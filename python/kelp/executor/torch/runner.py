"""The `ModelRunner` of real models: forward pass, then sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kelp.executor.torch.batch import Chunk, Sampled
from kelp.executor.torch.decoder import Decoder
from kelp.executor.torch.sampler import sample


class TorchRunner:
    """See `batch.ModelRunner`."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> list[Sampled]:
        """See `batch.ModelRunner`."""
        logits = self._decoder.forward(self._decoder.prepare(chunks))
        return sample(logits, [point for chunk in chunks for point in chunk.samples])
