"""Decoding steps as CUDA graphs: a step of many small kernels costs one launch.

A graph has fixed shapes and fixed addresses. Batches are padded up to the next captured size; padding rows read and
write a scratch block that no sequence owns. Everything a step needs travels in one integer matrix, a line per row:
token, position, blocks; the captured part derives the rest on the device.

Graphs are captured when a size first occurs, in the engine's thread. One that cannot be captured, or that answers
otherwise than the same step without it, ends the use of graphs: the step then runs as any other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kelp.core.types import BlockId, num_blocks_for
from kelp.executor.batching.batch import Chunk
from kelp.executor.torch.attention.paged import RowAttention
from kelp.executor.torch.decoder import Decoder
from kelp.executor.torch.inputs import StepInputs
from kelp.executor.torch.staging import stage

_log = logging.getLogger(__name__)

_DOUBLED_UP_TO = 16
_MIN_TABLE_BLOCKS, _TABLE_GROWTH = 256, 4
"""Tables come in few widths, so that short sequences do not carry the width of the longest possible."""

_REPLAY_TOLERANCE = 0.05
"""Of the largest logit: more than rounding in another order can do, less than a step that read something else."""

_TOKEN, _POSITION, _TABLE = 0, 1, 2


class Replay(Protocol):
    """A captured computation."""

    def __call__(self) -> torch.Tensor:
        """Run it again on what its input holds now; returns always the same tensor."""


Compute = Callable[[], torch.Tensor]
Capture = Callable[[Compute], Replay]


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """What steps may come.

    Attributes:
        max_rows: Sequences of a step.
        max_tokens: Positions of a sequence.
        block_size: Tokens of a block.
        scratch_block: Block of the pool that no sequence owns.
    """

    max_rows: int
    max_tokens: int
    block_size: int
    scratch_block: BlockId


@dataclass(frozen=True, slots=True)
class _Graph:
    lines: torch.Tensor
    replay: Replay


class DecodeGraphs:
    """Graphs of one decoder, by number of rows and width of the tables. For the engine's thread only."""

    def __init__(self, decoder: Decoder, attention: RowAttention, limits: GraphLimits, capture: Capture) -> None:
        """Args: `attention` is the decoder's own; `capture` is `capture_graph` anywhere but in tests."""
        self._decoder = decoder
        self._attention = attention
        self._limits = limits
        self._capture = capture
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._is_broken = False

    def fits(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step is one token for each sequence, all of them sampled, and no adapter's."""
        return (
            not self._is_broken
            and 0 < len(chunks) <= self._limits.max_rows
            and all(len(chunk.tokens) == 1 and len(chunk.samples) == 1 and not chunk.lora_name for chunk in chunks)
        )

    def forward(self, chunks: Sequence[Chunk], previous: torch.Tensor) -> torch.Tensor | None:
        """Run a step that fits.

        Args:
            chunks: The step.
            previous: `[num_previous] int64`, what the previous launch sampled, on the device.

        Returns:
            Logits `[num_chunks, vocab_size]`, overwritten by the next step; None if graphs do not work here.
        """
        size = _padded_size(len(chunks))
        width = self._table_width(max(num_blocks_for(chunk.start + 1, self._limits.block_size) for chunk in chunks))
        graph = self._graphs.get((size, width)) or self._capture_size(size, width)
        if graph is None:
            return None
        graph.lines.copy_(stage(self._lines(chunks, size, width), graph.lines.device), non_blocking=True)
        sources = [(row, chunk.token_source) for row, chunk in enumerate(chunks) if chunk.token_source is not None]
        if sources:
            rows, entries = stage(np.asarray(sources, np.int64).T, graph.lines.device)
            graph.lines[:, _TOKEN].index_copy_(0, rows, previous.index_select(0, entries).int())
        return graph.replay()[: len(chunks)]

    def _lines(self, chunks: Sequence[Chunk], size: int, width: int) -> npt.NDArray[np.int32]:
        lines = np.full((size, _TABLE + width), self._limits.scratch_block, np.int32)
        lines[:, :_TABLE] = 0
        for line, chunk in zip(lines, chunks, strict=False):
            line[_TOKEN], line[_POSITION] = chunk.tokens[0], chunk.start
            num_blocks = num_blocks_for(chunk.start + 1, self._limits.block_size)
            line[_TABLE : _TABLE + num_blocks] = chunk.block_ids[:num_blocks]
        return lines

    def _capture_size(self, size: int, width: int) -> _Graph | None:
        device = self._decoder.device
        lines = stage(self._lines([], size, width), device)

        def compute() -> torch.Tensor:
            return self._compute(lines)

        try:
            expected = compute().clone()
            replay = self._capture(compute)
            found = replay()
        except RuntimeError as error:
            self._give_up(f"{type(error).__name__}: {error}".splitlines()[0])
            return None
        difference, scale = (found - expected).abs().max(), expected.abs().max()
        if not bool(difference <= _REPLAY_TOLERANCE * scale):
            self._give_up("a replayed step differs from the same step without the graph")
            return None
        _log.info("captured a decoding step of %d rows and %d blocks each", size, width)
        graph = self._graphs[size, width] = _Graph(lines, replay)
        return graph

    def _give_up(self, reason: str) -> None:
        _log.warning("decoding goes on without CUDA graphs: %s", reason)
        self._is_broken = True
        self._graphs.clear()

    def _compute(self, lines: torch.Tensor) -> torch.Tensor:
        positions = lines[:, _POSITION].long()
        inputs = StepInputs(
            tokens=lines[:, _TOKEN].long(),
            positions=positions,
            sampled_rows=torch.arange(len(lines), device=lines.device),
            attention=self._attention.plan_rows(positions, lines[:, _TABLE:]),
        )
        return self._decoder.forward(inputs)

    def _table_width(self, num_blocks: int) -> int:
        width = _MIN_TABLE_BLOCKS
        while width < num_blocks:
            width *= _TABLE_GROWTH
        return min(width, num_blocks_for(self._limits.max_tokens, self._limits.block_size))


def capture_graph(compute: Compute) -> Replay:
    """Capture a computation on the current device, which it must have run on before.

    Raises:
        RuntimeError: It does something that a graph cannot hold, such as waiting for the device.
    """
    cuda: Any = torch.cuda
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        compute()
    cuda.current_stream().wait_stream(stream)
    graph = cuda.CUDAGraph()
    # Other threads (transfers) go on using the device meanwhile; that must not spoil the capture.
    with cuda.graph(graph, capture_error_mode="thread_local"):
        result = compute()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def _padded_size(num_rows: int) -> int:
    """Doubling, then multiples of 16."""
    if num_rows <= _DOUBLED_UP_TO:
        return 1 << (num_rows - 1).bit_length()
    return num_blocks_for(num_rows, _DOUBLED_UP_TO) * _DOUBLED_UP_TO
