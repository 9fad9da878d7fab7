"""The `ModelRunner` of real models: forward pass, then sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kelp.executor.torch.batch import Chunk, Sampled
from kelp.executor.torch.model import LlamaModel
from kelp.executor.torch.sampler import sample


class TorchRunner:
    """See `batch.ModelRunner`."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> list[Sampled]:
        """See `batch.ModelRunner`."""
        logits = self._model.forward(chunks)
        return sample(logits, [chunk.sample for chunk in chunks if chunk.sample is not None])
