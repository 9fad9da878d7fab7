"""One request inside the engine: its blocks, the steps it takes part in, and where it is in its life.

    WAITING ──admit──► RUNNING ──────────────► ENDED
       │                 │  ▲ ▲                  ▲
       │                 └──┘ preempt (WAITING)  │ release_export
       │               prefill: ─► LEASED ───────┤
       └──reserve──► IMPORTING ─► RUNNING        │ end_import (onboarding, too)
                         └─ abort ─► QUARANTINED ┘

A launched step is in flight until its tokens are known. What would be ENDED before that is RETIRING instead, until
its last step has landed.

Holds facts and derives others from them; decides nothing about other sequences.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from kelp.core.types import BlockId, FinishReason, Role, SequenceHash, num_blocks_for
from kelp.executor.base import ExecutorRequest, Tokens
from kelp.executor.batching.batch import Chunk, Sampled, SamplePoint
from kelp.executor.batching.drafts import Acceptance
from kelp.executor.batching.guide import Guide
from kelp.executor.batching.history import History, SequenceRules
from kelp.executor.batching.progress import Progress
from kelp.executor.batching.schedulable import Sealable, Stage

NO_TOKENS = Tokens((), ())


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of one request; changed by the scheduler and the engine only.

    Attributes:
        arrival: Rank by arrival; the lowest is served first and preempted last.
        guide: Restricts the output; None for a free one.
        history: Its tokens.
        num_foreseen: Tokens behind the known ones that steps in flight will yield.
        num_launched: Positions whose KV is in the blocks or being computed by a step in flight.
        num_computed: Positions whose KV is in the blocks for good.
        num_flights: Steps in flight that it takes part in.
        num_announced: Prompt blocks reported through `Prefilled`.
        is_import: The prompt's KV comes from a peer; False again once it came or `fail_import` was called.
        num_onboardable: Leading blocks that the worker can bring from lower tiers; 0 again once it has, or need not.
        is_export_released: `release_export` came while the sequence ran.
        acceptance: How well its drafts do.
        awaited_hash: The block that it lets another sequence compute.
        promise_end_s: How long others wait for the blocks that it imports or onboards; None if they do not.
    """

    request: ExecutorRequest
    arrival: int
    rules: SequenceRules
    progress: Progress
    guide: Guide | None = None
    history: History = field(init=False)
    stage: Stage = Stage.WAITING
    is_import: bool = False
    num_onboardable: int = 0
    is_export_released: bool = False
    num_foreseen: int = 0
    num_launched: int = 0
    num_computed: int = 0
    num_flights: int = 0
    num_announced: int = 0
    block_ids: list[BlockId] = field(default_factory=list)
    acceptance: Acceptance = field(default_factory=Acceptance)
    awaited_hash: SequenceHash | None = None
    promise_end_s: float | None = None
    _num_sealed: int = 0
    _token_source: int = 0

    def __post_init__(self) -> None:
        self.is_import = self.request.role is Role.DECODE
        self.num_onboardable = self.request.onboard_blocks
        self.history = History(self.request, self.rules, self.guide)

    @property
    def is_prefill_only(self) -> bool:
        """Ends after the first token and keeps its blocks for a peer."""
        return self.request.role is Role.PREFILL

    @property
    def is_live(self) -> bool:
        """Whether its request still goes on."""
        return self.stage in (Stage.WAITING, Stage.IMPORTING, Stage.RUNNING)

    @property
    def is_preemptible(self) -> bool:
        """Whether its blocks may be taken away: no peer reads or writes them."""
        return self.stage is Stage.RUNNING and not self.is_prefill_only

    @property
    def is_foreseeable(self) -> bool:
        """See `History`."""
        return self.history.is_foreseeable

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.rules.block_size

    @property
    def num_tokens(self) -> int:
        """Prompt plus generated tokens."""
        return self.history.num_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """Length of what the request came with, earlier output included."""
        return len(self.request.prompt)

    @property
    def num_pending(self) -> int:
        """Known or foreseen tokens whose KV no step computes yet; 1 while decoding, 0 if that depends on a flight."""
        return self.num_tokens + self.num_foreseen - self.num_launched

    @property
    def num_draftable(self) -> int:
        """Most drafts of use: with the token that follows them they reach the sequence's greatest length."""
        return self.history.max_tokens - self.num_tokens - 1

    @property
    def is_prompt_computed(self) -> bool:
        """Whether the whole prompt's KV is in the blocks for good."""
        return self.num_computed >= self.num_prompt_tokens

    @property
    def num_blocks_wanted(self) -> int:
        """Blocks that all known and foreseen tokens need; of an import, its prompt."""
        return num_blocks_for(self.num_tokens + self.num_foreseen, self.rules.block_size)

    def matchable_hashes(self) -> list[SequenceHash]:
        """Names of the blocks that need not be computed if the cache has them.

        An import needs no logits, so all full blocks count; otherwise at least the last token is computed.
        """
        num_positions = self.num_tokens if self.is_import else self.num_tokens - 1
        return self.history.block_hashes(num_positions // self.rules.block_size)

    def full_hashes(self) -> list[SequenceHash]:
        """Names of the full blocks of known tokens."""
        return self.history.block_hashes(self.num_tokens // self.rules.block_size)

    def adopt(self, matched: list[BlockId], allocated: list[BlockId]) -> None:
        """Start with cached blocks followed by empty ones."""
        assert not self.block_ids
        self.block_ids = [*matched, *allocated]
        self._num_sealed = len(matched)
        self.num_computed = self.num_launched = len(matched) * self.rules.block_size
        self.progress.new_blocks += len(allocated)

    def extend(self, allocated: list[BlockId]) -> None:
        """Go on with more empty blocks."""
        self.block_ids += allocated
        self.progress.new_blocks += len(allocated)

    def surrender(self) -> list[BlockId]:
        """Drop the blocks and everything computed in them; the caller gives them back."""
        assert not self.num_flights
        block_ids, self.block_ids = self.block_ids, []
        self.num_computed = self.num_launched = 0
        self._num_sealed = 0
        return block_ids

    def import_prompt(self) -> None:
        """A peer has put the whole prompt's KV into the blocks."""
        self.is_import = False
        self.num_computed = self.num_launched = self.num_prompt_tokens

    def onboard(self, num_blocks: int) -> None:
        """The first blocks hold their KV, `num_blocks` of those that could be brought and at least the cached ones."""
        num_cached = self.num_computed // self.rules.block_size
        num_blocks = max(num_cached, min(num_blocks, self.num_onboardable))
        self.num_onboardable = 0
        self.num_computed = self.num_launched = num_blocks * self.rules.block_size
        self.progress.cached_tokens = self.num_computed
        self.progress.onboarded_blocks = num_blocks - num_cached

    def take_sealable(self) -> Sealable | None:
        """See `Schedulable`."""
        num_full = self.num_computed // self.rules.block_size
        if num_full <= self._num_sealed:
            return None
        hashes = self.history.block_hashes(num_full)
        first, self._num_sealed = self._num_sealed, num_full
        return Sealable(self.block_ids[first:num_full], hashes[first:], hashes[first - 1] if first else None, first)

    def take_announceable(self) -> list[BlockId]:
        """Prompt blocks whose KV became final since the last call; a partial one only at the prompt's end."""
        num_final = num_blocks_for(self.num_prompt_tokens, self.rules.block_size)
        if not self.is_prompt_computed:
            num_final = self.num_computed // self.rules.block_size
        first, self.num_announced = self.num_announced, num_final
        return self.block_ids[first:num_final]

    def launch(self, num_tokens: int, num_drafts: int, num_samples_before: int) -> Chunk:
        """The next pending tokens as work for a step, which is in flight from now on.

        Args:
            num_tokens: How many, drafts not included.
            num_drafts: How many drafts to verify behind them; cut where the guide refuses one.
            num_samples_before: Sample points of the same step that come first.
        """
        start, end = self.num_launched, self.num_launched + num_tokens
        is_foreseen = end > self.num_tokens
        points: Many[SamplePoint] = ()
        if end == self.num_tokens + self.num_foreseen:
            points = self.history.sample_points(end, num_drafts)
            end += len(points) - 1
        chunk = Chunk(
            tokens=self.history.inputs(start, end),
            start=start,
            block_ids=self.block_ids,
            samples=points,
            lora_name=self.request.lora_name,
            token_source=self._token_source if is_foreseen else None,
        )
        self.num_launched = end
        self.num_flights += 1
        self.num_foreseen += self._is_followed(chunk)
        self._token_source = num_samples_before
        return chunk

    def land(self, chunk: Chunk, sampled: Many[Sampled]) -> tuple[Tokens, FinishReason | None]:
        """Take what a step says of this sequence.

        Args:
            chunk: From `launch`; chunks land in the order of their launches.
            sampled: One per sample point of the chunk.

        Returns:
            The new tokens: what was sampled up to the first wrong draft or the end; and the reason if it is the end.
        """
        num_drafts = chunk.num_drafts
        self.num_foreseen -= self._is_followed(chunk)
        self.num_computed = chunk.start + len(chunk.tokens) - num_drafts
        if not sampled:
            return NO_TOKENS, None
        token_ids, log_probs = zip(*sampled, strict=True)
        num_plausible = 1
        if num_drafts:
            num_plausible += self.history.num_right_drafts(token_ids[:num_drafts])
        num_new, reason = self.history.extend(token_ids[:num_plausible])
        if num_drafts:
            self.num_computed += num_new - 1
            self.num_launched = self.num_computed
        return Tokens(token_ids[:num_new], log_probs[:num_new]), reason

    def _is_followed(self, chunk: Chunk) -> bool:
        """Whether a launched chunk yields exactly one more token, and not the last that there may be."""
        return len(chunk.samples) == 1 and chunk.start + len(chunk.tokens) + 1 < self.history.max_tokens
