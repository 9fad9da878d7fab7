"""One request inside the engine: its tokens, its blocks, and where it is in its life.

    WAITING ──admit──► RUNNING ──────────────► ENDED
       │                 │  ▲ ▲                  ▲
       │                 └──┘ preempt (WAITING)  │ release_export
       │               prefill: ─► LEASED ───────┤
       └──reserve──► IMPORTING ─► RUNNING        │ end_import
                         └─ abort ─► QUARANTINED ┘

Holds facts and derives others from them; decides nothing about other sequences.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kelp.core.hashing import child_hash, sequence_hashes
from kelp.core.types import BlockId, FinishReason, Role, SequenceHash, num_blocks_for
from kelp.executor.base import ExecutorRequest
from kelp.executor.torch.batch import Chunk, SamplePoint
from kelp.executor.torch.guide import Guide


class Stage(enum.Enum):
    """See the module docstring."""

    WAITING = "waiting"
    IMPORTING = "importing"
    RUNNING = "running"
    LEASED = "leased"
    QUARANTINED = "quarantined"
    ENDED = "ended"


@dataclass(slots=True)
class Progress:
    """What the worker reports about a request: counts for `RequestUsage`, stamps for `RequestTimings`."""

    arrival_ns: int
    first_scheduled_ns: int = 0
    prefill_done_ns: int = 0
    transfer_start_ns: int = 0
    transfer_done_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    cached_tokens: int = 0
    new_blocks: int = 0
    reused_blocks: int = 0
    transferred_blocks: int = 0


@dataclass(frozen=True, slots=True)
class SequenceRules:
    """What is equal for all sequences of one engine."""

    block_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of one request; changed by the scheduler and the engine only.

    Attributes:
        arrival: Rank by arrival; the lowest is served first and preempted last.
        num_tokens: Prompt plus generated tokens.
        num_computed: Positions whose KV is in the blocks.
        num_announced: Prompt blocks reported through `Prefilled`.
        is_import: The prompt's KV comes from a peer; False again once `fail_import` was called.
        is_export_released: `release_export` came while the sequence ran.
        guide: Restricts the output; has accepted the tokens generated so far.
    """

    request: ExecutorRequest
    arrival: int
    rules: SequenceRules
    progress: Progress
    guide: Guide | None = None
    stage: Stage = Stage.WAITING
    is_import: bool = False
    is_export_released: bool = False
    num_tokens: int = 0
    num_computed: int = 0
    num_announced: int = 0
    block_ids: list[BlockId] = field(default_factory=list)
    _num_sealed: int = 0
    _tokens: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    _hashes: list[SequenceHash] = field(default_factory=list)
    _stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        prompt = self.request.prompt
        self.is_import = self.request.role is Role.DECODE
        self.num_tokens = len(prompt)
        num_to_come = 1 if self.is_prefill_only else self.request.num_tokens_to_come
        self._tokens = np.empty(len(prompt) + num_to_come, np.int32)
        self._tokens[: len(prompt)] = prompt
        self._hashes = sequence_hashes(prompt, self.rules.block_size, self.request.seed_hash)
        eos = () if sampling.ignore_eos else self.rules.eos_token_ids
        self._stop_token_ids = frozenset((*eos, *sampling.stop_token_ids))

    @property
    def is_prefill_only(self) -> bool:
        """Ends after the first token and keeps its blocks for a peer."""
        return self.request.role is Role.PREFILL

    @property
    def is_preemptible(self) -> bool:
        """Whether its blocks may be taken away: no peer reads or writes them."""
        return self.stage is Stage.RUNNING and not self.is_prefill_only

    @property
    def num_prompt_tokens(self) -> int:
        """Length of what the request came with, earlier output included."""
        return len(self.request.prompt)

    @property
    def num_pending(self) -> int:
        """Known tokens whose KV is not computed yet; 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def is_prompt_computed(self) -> bool:
        """Whether the whole prompt's KV is in the blocks."""
        return self.num_computed >= self.num_prompt_tokens

    @property
    def num_blocks_wanted(self) -> int:
        """Blocks that all known tokens need; of an import, its prompt."""
        return num_blocks_for(self.num_tokens, self.rules.block_size)

    def matchable_hashes(self) -> list[SequenceHash]:
        """Names of the blocks that need not be computed if the cache has them.

        An import needs no logits, so all full blocks count; otherwise at least the last token is computed.
        """
        num_positions = self.num_tokens if self.is_import else self.num_tokens - 1
        return self._hashes_until(num_positions // self.rules.block_size)

    def adopt(self, matched: list[BlockId], allocated: list[BlockId]) -> None:
        """Start with cached blocks followed by empty ones."""
        assert not self.block_ids
        self.block_ids = [*matched, *allocated]
        self._num_sealed = len(matched)
        self.num_computed = len(matched) * self.rules.block_size
        self.progress.new_blocks += len(allocated)

    def surrender(self) -> list[BlockId]:
        """Drop the blocks and everything computed in them; the caller gives them back."""
        block_ids, self.block_ids = self.block_ids, []
        self.num_computed = 0
        self._num_sealed = 0
        return block_ids

    def take_sealable(self) -> list[tuple[BlockId, SequenceHash]]:
        """Full blocks whose KV became final since the last call, with their names."""
        num_full = self.num_computed // self.rules.block_size
        hashes = self._hashes_until(num_full)
        first, self._num_sealed = self._num_sealed, num_full
        return [(self.block_ids[index], hashes[index]) for index in range(first, num_full)]

    def take_announceable(self) -> list[BlockId]:
        """Prompt blocks whose KV became final since the last call; a partial one only at the prompt's end."""
        num_final = num_blocks_for(self.num_prompt_tokens, self.rules.block_size)
        if not self.is_prompt_computed:
            num_final = self.num_computed // self.rules.block_size
        first, self.num_announced = self.num_announced, num_final
        return self.block_ids[first:num_final]

    def chunk(self, num_tokens: int) -> Chunk:
        """The next `num_tokens` pending tokens as work for a step."""
        end = self.num_computed + num_tokens
        return Chunk(
            tokens=self._tokens[self.num_computed : end],
            start=self.num_computed,
            block_ids=self.block_ids,
            samples=(self._sample_point(),) if end == self.num_tokens else (),
            lora_name=self.request.lora_name,
        )

    def append(self, token_id: int) -> FinishReason | None:
        """Add a generated token.

        Returns:
            Why the sequence ends with it, or None if it goes on.
        """
        self._tokens[self.num_tokens] = token_id
        self.num_tokens += 1
        if self.guide is not None:
            self.guide.accept(token_id)
        sampling = self.request.sampling
        num_generated = self.num_tokens - self.request.num_original_tokens
        if token_id in self._stop_token_ids and num_generated >= sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_generated >= sampling.max_tokens else None

    def _sample_point(self) -> SamplePoint:
        return SamplePoint(
            params=self.request.sampling,
            tokens=self._tokens[: self.num_tokens],
            num_prompt_tokens=self.request.num_original_tokens,
            stop_token_ids=self._stop_token_ids,
            allowed=self.guide.allowed(())[0] if self.guide is not None else None,
        )

    def _hashes_until(self, num_blocks: int) -> list[SequenceHash]:
        size = self.rules.block_size
        while len(self._hashes) < num_blocks:
            start = len(self._hashes) * size
            parent = self._hashes[-1] if self._hashes else self.request.seed_hash
            self._hashes.append(child_hash(parent, self._tokens[start : start + size]))
        return self._hashes[:num_blocks]
