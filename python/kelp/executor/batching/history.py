"""What a sequence has said: prompt, output, and guesses at what comes next; when it has said enough.

Everything that depends on token ids is here; blocks, steps and other sequences are not.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kelp.core.hashing import child_hash, sequence_hashes
from kelp.core.types import FinishReason, Role, SequenceHash
from kelp.executor.base import ExecutorRequest
from kelp.executor.batching.batch import SamplePoint, SamplePoints
from kelp.executor.batching.guide import Guide

Tokens = npt.NDArray[np.int32]
"""`[num_tokens] int32`."""


@dataclass(frozen=True, slots=True)
class SequenceRules:
    """What is equal for all sequences of one engine."""

    block_size: int
    eos_token_ids: tuple[int, ...]


class History:
    """Tokens of one request, in a buffer that holds as many as it may ever have.

    Attributes:
        num_tokens: Prompt plus generated tokens.
        guide: Restricts the output; has accepted the tokens generated so far.
    """

    def __init__(self, request: ExecutorRequest, rules: SequenceRules, guide: Guide | None) -> None:
        prompt, sampling = request.prompt, request.sampling
        self._request = request
        self._block_size = rules.block_size
        self.guide = guide
        self.num_tokens = len(prompt)
        self._output_start = request.num_original_tokens
        num_to_come = 1 if request.role is Role.PREFILL else request.num_tokens_to_come
        self._buffer = np.zeros(len(prompt) + num_to_come, np.int32)
        self._buffer[: len(prompt)] = prompt
        self._hashes = sequence_hashes(prompt, rules.block_size, request.seed_hash)
        eos = () if sampling.ignore_eos else rules.eos_token_ids
        self._stop_token_ids = frozenset((*eos, *sampling.stop_token_ids))

    @property
    def max_tokens(self) -> int:
        """Prompt plus output, at most."""
        return len(self._buffer)

    @property
    def known(self) -> Tokens:
        """`[num_tokens] int32`; a view, valid until the next token."""
        return self._buffer[: self.num_tokens]

    @property
    def is_foreseeable(self) -> bool:
        """Whether the choice of a token depends on the logits and on how many tokens there are, but not on which."""
        sampling = self._request.sampling
        is_penalised = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
        return not is_penalised and not sampling.bad_words_ids and self.guide is None

    def append(self, token_id: int) -> FinishReason | None:
        """Add a generated token.

        Returns:
            Why the sequence ends with it, or None if it goes on; `ERROR` is the guide's.
        """
        self._buffer[self.num_tokens] = token_id
        self.num_tokens += 1
        sampling = self._request.sampling
        num_generated = self.num_tokens - self._output_start
        if self.guide is not None:
            self.guide.accept(token_id)
            if self.guide.error:
                return FinishReason.ERROR
            if self.guide.is_finished:
                return FinishReason.STOP
        if token_id in self._stop_token_ids and num_generated >= sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_generated >= sampling.max_tokens else None

    def extend(self, token_ids: Many[int]) -> tuple[int, FinishReason | None]:
        """Add generated tokens up to the one with which the sequence ends.

        Returns:
            How many there are now of them, and why the sequence ends with the last of those, if it does.
        """
        num_left = self._request.sampling.max_tokens - (self.num_tokens - self._output_start)
        num_new = len(token_ids)
        if 1 < num_new <= num_left and self.guide is None and self._stop_token_ids.isdisjoint(token_ids):
            self._buffer[self.num_tokens : self.num_tokens + num_new] = token_ids
            self.num_tokens += num_new
            return num_new, FinishReason.LENGTH if num_new == num_left else None
        for index, token_id in enumerate(token_ids):
            reason = self.append(token_id)
            if reason is not None:
                return index + 1, reason
        return num_new, None

    def put_drafts(self, drafts: Tokens) -> None:
        """Guess how the sequence goes on; the guesses stand behind the known tokens until others take their place."""
        self._buffer[self.num_tokens : self.num_tokens + len(drafts)] = drafts

    def num_right_drafts(self, token_ids: Many[int]) -> int:
        """How many of the guesses for the next tokens are these, up to the first wrong one."""
        drafts = self._buffer[self.num_tokens : self.num_tokens + len(token_ids)].tolist()
        pairs = zip(drafts, token_ids, strict=True)
        return next((index for index, (draft, token_id) in enumerate(pairs) if draft != token_id), len(token_ids))

    def inputs(self, start: int, end: int) -> Tokens:
        """Known tokens and guesses at these positions; a view."""
        return self._buffer[start:end]

    def sample_points(self, num_tokens: int, num_drafts: int) -> SamplePoints:
        """After `num_tokens` tokens and after each of the drafts behind them, up to one that the guide refuses."""
        masks: Many[npt.NDArray[np.int32]] = ()
        if self.guide is not None:
            masks = self.guide.allowed(self._buffer[num_tokens : num_tokens + num_drafts].tolist())
            num_drafts = len(masks) - 1
        last = SamplePoint(
            self._request.sampling,
            self._buffer[: num_tokens + num_drafts],
            self._output_start,
            self._stop_token_ids,
            masks[-1] if masks else None,
        )
        return SamplePoints(last, num_drafts + 1, masks)

    def block_hashes(self, num_blocks: int) -> list[SequenceHash]:
        """Names of the first blocks, all of them full of known tokens."""
        size = self._block_size
        while len(self._hashes) < num_blocks:
            start = len(self._hashes) * size
            parent = self._hashes[-1] if self._hashes else self._request.seed_hash
            self._hashes.append(child_hash(parent, self._buffer[start : start + size]))
        return self._hashes[:num_blocks]
