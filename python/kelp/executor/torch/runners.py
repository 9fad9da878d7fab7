"""Which `ModelRunner` serves a decoder: one that computes at once on the CPU, one that queues on a device."""

from __future__ import annotations

import logging

from kelp.core.types import BlockId, KVLayout
from kelp.executor.batching.batch import ModelRunner
from kelp.executor.torch.attention.paged import RowAttention
from kelp.executor.torch.cuda.graphs import DecodeGraphs, GraphLimits, capture_graph
from kelp.executor.torch.cuda.runner import CudaRunner
from kelp.executor.torch.decoder import Decoder
from kelp.executor.torch.options import TorchExecutorOptions
from kelp.executor.torch.runner import TorchRunner

_log = logging.getLogger(__name__)

NUM_SCRATCH_BLOCKS = {"cpu": 0, "cuda": 1}
"""Blocks beyond the layout's that the runner of a device type needs, at the end of the decoder's pool."""


def make_runner(
    decoder: Decoder, layout: KVLayout, max_model_tokens: int, options: TorchExecutorOptions
) -> ModelRunner:
    """A runner for `decoder`, whose pool has the layout's blocks and then `NUM_SCRATCH_BLOCKS`."""
    if decoder.device.type == "cpu":
        return TorchRunner(decoder)
    attention = decoder.attention
    if not isinstance(attention, RowAttention):
        _log.info("decoding without CUDA graphs: the attention backend plans on the host")
        return CudaRunner(decoder, None)
    if not options.enable_cuda_graphs:
        return CudaRunner(decoder, None)
    limits = GraphLimits(options.max_running, max_model_tokens, layout.block_size, BlockId(layout.num_blocks))
    return CudaRunner(decoder, DecodeGraphs(decoder, attention, limits, capture_graph))
