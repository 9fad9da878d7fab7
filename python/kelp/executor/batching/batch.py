"""What one engine step asks of a model, and what it gets back.

The seam between scheduling and arithmetic: the engine knows `ModelRunner` only, so that its bookkeeping is tested
against a runner that needs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, overload

import numpy as np
import numpy.typing as npt

from kelp.core.messages import SamplingParams
from kelp.core.types import BlockId


@dataclass(frozen=True, slots=True)
class SamplePoint:
    """Everything the choice of one token depends on besides the logits.

    Attributes:
        tokens: `[num_tokens] int32`, prompt and output so far, drafts before this point included; a view, valid
            during the step only.
        num_prompt_tokens: Where the output starts in `tokens`.
        stop_token_ids: Ids that would end the sequence; masked while fewer than `min_tokens` were generated.
        allowed: `[num_words] int32`, bit *i* of word *w* set if token `32 * w + i` may come; at least one bit for each
            token of the vocabulary, further ones are ignored. None allows all.
    """

    params: SamplingParams
    tokens: npt.NDArray[np.int32]
    num_prompt_tokens: int
    stop_token_ids: frozenset[int]
    allowed: npt.NDArray[np.int32] | None = None

    @property
    def output(self) -> npt.NDArray[np.int32]:
        """`[num_output_tokens] int32` generated so far."""
        return self.tokens[self.num_prompt_tokens :]


class SamplePoints(Sequence[SamplePoint]):
    """Points behind consecutive tokens of one sequence; those before the last one are made when asked for.

    A runner that needs no more than their number and their parameters spares itself the rest.

    Args:
        last: The last of them.
        count: How many there are.
        masks: `SamplePoint.allowed` of each; empty for none.
    """

    __slots__ = ("_count", "_masks", "last")

    def __init__(self, last: SamplePoint, count: int, masks: Sequence[npt.NDArray[np.int32]] = ()) -> None:
        self.last = last
        self._count = count
        self._masks = masks

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> SamplePoint: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[SamplePoint]: ...

    def __getitem__(self, index: int | slice) -> SamplePoint | Sequence[SamplePoint]:
        if isinstance(index, slice):
            return [self._point(place) for place in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"point {index} of {self._count}")
        return self._point(index % self._count)

    def _point(self, place: int) -> SamplePoint:
        num_behind = self._count - 1 - place
        if not num_behind:
            return self.last
        last = self.last
        return SamplePoint(
            last.params,
            last.tokens[:-num_behind],
            last.num_prompt_tokens,
            last.stop_token_ids,
            self._masks[place] if self._masks else None,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence that one step computes.

    Attributes:
        tokens: `[num_tokens] int32`, a view; drafts that the step shall verify come last.
        start: Position of the first; the KV of all earlier positions is in the blocks.
        block_ids: Blocks of the sequence in order, enough for `start + num_tokens` positions; read during `launch`
            only.
        samples: One point for each of the chunk's last rows that yields a token; empty inside a prompt.
        lora_name: Adapter of the sequence; empty for none.
        token_source: The chunk's only token is not known to the host yet: it is the one that this entry of the
            previous launch's samples yields, and `tokens` holds a placeholder. Such a chunk's sample point depends
            on the number of tokens before it, not on their ids.
    """

    tokens: npt.NDArray[np.int32]
    start: int
    block_ids: Sequence[BlockId]
    samples: Sequence[SamplePoint] = ()
    lora_name: str = ""
    token_source: int | None = None

    @property
    def num_drafts(self) -> int:
        """How many of the last tokens are guesses."""
        return max(0, len(self.samples) - 1)


class Sampled(NamedTuple):
    """One chosen token and its log-probability under the raw logits."""

    token_id: int
    log_prob: float


class Launched(Protocol):
    """A step that the device has been given."""

    def result(self) -> list[Sampled]:
        """Wait for the step's end.

        Returns:
            One entry per sample point, in the order of the chunks and of the points in each.
        """


@dataclass(frozen=True, slots=True)
class Finished:
    """A step that was computed when it was launched."""

    sampled: list[Sampled]

    def result(self) -> list[Sampled]:
        """See `Launched`."""
        return self.sampled


class ModelRunner(Protocol):
    """Computes steps one after the other. Called from the engine's thread only."""

    def launch(self, chunks: Sequence[Chunk]) -> Launched:
        """Begin to write the chunks' KV into their blocks and to sample; earlier launches come first.

        The caller may launch again before it asks for a result, and leaves the blocks alone until it has it.
        """
