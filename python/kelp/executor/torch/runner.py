"""The `ModelRunner` of real models: forward pass, then sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from kelp.executor.batching.batch import Chunk, Finished, Sampled
from kelp.executor.torch.decoder import Decoder
from kelp.executor.torch.sampler import sample


class TorchRunner:
    """See `batch.ModelRunner`; computes at once, so that a launched step has ended."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._sampled: list[Sampled] = []

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk]) -> Finished:
        """See `batch.ModelRunner`."""
        known = [self._resolve(chunk) for chunk in chunks]
        logits = self._decoder.forward(self._decoder.prepare(known))
        self._sampled = sample(logits, [point for chunk in known for point in chunk.samples])
        return Finished(self._sampled)

    def _resolve(self, chunk: Chunk) -> Chunk:
        """The chunk with the token that the previous launch chose for it."""
        if chunk.token_source is None:
            return chunk
        return replace(chunk, tokens=np.asarray([self._sampled[chunk.token_source].token_id], np.int32))
