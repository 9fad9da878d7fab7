"""What the scheduler needs to know of a sequence, and who may guess for it.

The engine's sequences (`sequence`) know tokens, guides and clients as well; the simulator's know numbers only.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

from kelp.core.types import BlockId, SequenceHash


class Stage(enum.Enum):
    """Where a sequence is in its life; `sequence` draws it."""

    WAITING = "waiting"
    IMPORTING = "importing"
    RUNNING = "running"
    LEASED = "leased"
    QUARANTINED = "quarantined"
    RETIRING = "retiring"
    ENDED = "ended"


class Sealable(NamedTuple):
    """Blocks that follow each other in one sequence, with their names.

    Attributes:
        block_ids: At least one.
        hashes: One for each.
        parent: Names the block before the first one; None at the start of the sequence.
        position: Index of the first one in the sequence.
    """

    block_ids: Sequence[BlockId]
    hashes: Sequence[SequenceHash]
    parent: SequenceHash | None
    position: int


class Schedulable(Protocol):
    """One sequence; `sequence.Sequence` says what the attributes mean."""

    stage: Stage
    awaited_hash: SequenceHash | None
    promise_end_s: float | None

    @property
    def arrival(self) -> int:
        """Rank by arrival; the lowest is served first and preempted last."""

    @property
    def block_size(self) -> int:
        """Tokens per block."""

    @property
    def block_ids(self) -> Sequence[BlockId]:
        """Blocks that it holds, in order."""

    @property
    def is_import(self) -> bool:
        """The prompt's KV comes from a peer."""

    @property
    def num_onboardable(self) -> int:
        """Leading blocks that the worker can bring from lower tiers."""

    @property
    def is_preemptible(self) -> bool:
        """Whether its blocks may be taken away: no peer reads or writes them."""

    @property
    def is_foreseeable(self) -> bool:
        """Whether a step can be planned before it is known which token the last one yielded."""

    @property
    def num_tokens(self) -> int:
        """Prompt plus generated tokens."""

    @property
    def num_foreseen(self) -> int:
        """Tokens behind the known ones that steps in flight will yield."""

    @property
    def num_flights(self) -> int:
        """Steps in flight that it takes part in."""

    @property
    def num_pending(self) -> int:
        """Known or foreseen tokens whose KV no step computes yet; 1 while decoding, 0 if that depends on a flight."""

    @property
    def num_blocks_wanted(self) -> int:
        """Blocks that all known and foreseen tokens need; of an import, its prompt."""

    def matchable_hashes(self) -> Sequence[SequenceHash]:
        """Names of the blocks that need not be computed if the cache has them."""

    def full_hashes(self) -> Sequence[SequenceHash]:
        """Names of the full blocks of known tokens."""

    def adopt(self, matched: list[BlockId], allocated: list[BlockId]) -> None:
        """Start with cached blocks followed by empty ones."""

    def extend(self, allocated: list[BlockId]) -> None:
        """Go on with more empty blocks."""

    def surrender(self) -> list[BlockId]:
        """Drop the blocks and everything computed in them; the caller gives them back."""

    def take_sealable(self) -> Sealable | None:
        """Full blocks whose KV became final since the last call; None without any."""


SchedulableT = TypeVar("SchedulableT", bound=Schedulable)
_DraftedT = TypeVar("_DraftedT", contravariant=True)
_OfferedT = TypeVar("_OfferedT", contravariant=True)


class Drafting(Protocol[_DraftedT]):
    """Who guesses what sequences say next; `speculation` guesses for the engine's."""

    @property
    def may_draft(self) -> bool:
        """Whether any sequence may get drafts at all."""

    def num_worthwhile(self, sequence: _DraftedT, num_decodes: int) -> int:
        """Drafts of a sequence that pay in a step of `num_decodes` decoding sequences, whatever they turn out to be."""

    def draft(self, sequences: Sequence[_DraftedT], limits: Sequence[int]) -> list[int]:
        """Put up to `limits[i]` drafts behind the tokens of `sequences[i]`; returns how many each got."""


class Offering(Protocol[_OfferedT]):
    """Who offers blocks to lower tiers, and keeps some of them for that; `offers` does for the engine's."""

    def sealed(self, sequence: _OfferedT, run: Sealable) -> None:
        """The KV of these blocks became final."""

    def yield_kept(self) -> bool:
        """A running sequence finds no block; returns whether it does now."""
