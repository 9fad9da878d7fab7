"""The `ModelRunner` for a device that computes while the host goes on.

A launch queues a step and returns. The tokens it samples stay on the device, where the next launch takes its inputs
from; the host gets a copy once it asks. KV is in the blocks when a step's result is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kelp.executor.batching.batch import Chunk, Sampled
from kelp.executor.torch.cuda.graphs import DecodeGraphs
from kelp.executor.torch.decoder import Decoder
from kelp.executor.torch.device_sampler import plan_draws
from kelp.executor.torch.sampler import sample_rows
from kelp.executor.torch.staging import on_device, stage


class QueuedStep:
    """See `batch.Launched`; its result is on its way to the host."""

    def __init__(self, token_ids: torch.Tensor, log_probs: torch.Tensor) -> None:
        """Args: `token_ids` `[num_samples] int64`, `log_probs` `[num_samples] fp32`, both on the device."""
        self._token_ids = _to_host(token_ids)
        self._log_probs = _to_host(log_probs)
        self._event: Any = None
        if token_ids.is_cuda:
            cuda: Any = torch.cuda
            # Waiting must leave the core to other threads: transfers and their progress run meanwhile.
            self._event = cuda.Event(blocking=True)
            self._event.record()

    def result(self) -> list[Sampled]:
        """See `Launched`."""
        if self._event is not None:
            self._event.synchronize()
        pairs = zip(self._token_ids.tolist(), self._log_probs.tolist(), strict=True)
        return [Sampled(token_id, log_prob) for token_id, log_prob in pairs]


class CudaRunner:
    """See `batch.ModelRunner`."""

    def __init__(self, decoder: Decoder, graphs: DecodeGraphs | None) -> None:
        """Args: `graphs` of the same decoder, or None to run every step kernel by kernel."""
        self._decoder = decoder
        self._graphs = graphs
        self._sampled = torch.empty(0, dtype=torch.int64, device=decoder.device)

    def launch(self, chunks: Sequence[Chunk]) -> QueuedStep:
        """See `batch.ModelRunner`."""
        # The current device is a thread's, and kernels of the compiler go to the current one.
        with torch.inference_mode(), on_device(self._decoder.device):
            return self._launch(chunks)

    def _launch(self, chunks: Sequence[Chunk]) -> QueuedStep:
        points = [point for chunk in chunks for point in chunk.samples]
        draws = plan_draws(points, self._decoder.device)
        logits = self._forward(chunks)
        log_probs = torch.empty(0, device=self._decoder.device)
        sampled = self._sampled.new_empty(0)
        if points:
            sampled, log_probs = sample_rows(logits, points, draws)
        self._sampled = sampled
        return QueuedStep(sampled, log_probs)

    def _forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        if self._graphs is not None and self._graphs.fits(chunks):
            logits = self._graphs.forward(chunks, self._sampled)
            if logits is not None:
                return logits
        inputs = self._decoder.prepare(chunks)
        ends = np.cumsum([len(chunk.tokens) for chunk in chunks]).tolist()
        sources = [
            (end - 1, chunk.token_source)
            for end, chunk in zip(ends, chunks, strict=True)
            if chunk.token_source is not None
        ]
        if sources:
            rows, entries = stage(np.asarray(sources, np.int64).T, self._decoder.device)
            inputs.tokens.index_copy_(0, rows, self._sampled.index_select(0, entries))
        return self._decoder.forward(inputs)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is complete when everything queued so far is."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
