"""What one engine step asks of a model, and what it gets back.

The seam between scheduling and arithmetic: the engine knows `ModelRunner` only, so that its bookkeeping is tested
against a runner that needs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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
        allowed: `[ceil(vocab_size / 32)] int32`, bit *i* of word *w* set if token `32 * w + i` may come; None allows
            all.
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


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence that one step computes.

    Attributes:
        tokens: `[num_tokens] int32`, a view; drafts that the step shall verify come last.
        start: Position of the first; the KV of all earlier positions is in the blocks.
        block_ids: Blocks of the sequence in order, enough for `start + num_tokens` positions.
        samples: One point for each of the chunk's last rows that yields a token; empty inside a prompt.
        lora_name: Adapter of the sequence; empty for none.
    """

    tokens: npt.NDArray[np.int32]
    start: int
    block_ids: Sequence[BlockId]
    samples: tuple[SamplePoint, ...] = ()
    lora_name: str = ""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token and its log-probability under the raw logits."""

    token_id: int
    log_prob: float


class ModelRunner(Protocol):
    """Computes one step. Called from the engine's thread only."""

    def run(self, chunks: Sequence[Chunk]) -> list[Sampled]:
        """Write the chunks' KV into their blocks and sample.

        Returns:
            One entry per sample point, in the order of `chunks` and of the points in each.
        """
