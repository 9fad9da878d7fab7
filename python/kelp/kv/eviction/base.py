"""The contract of eviction policies.

A policy keeps the order of the blocks of one tier that could leave; the tier tells it what happens and asks who goes.
It holds names and numbers only: no bytes, no clock (time is the count of `hit` and `insert` calls), no randomness, so
that the simulator and the block manager run the very same code and equal histories give equal victims.

Not thread-safe: belongs to whoever owns the tier's books.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kelp.core.types import SequenceHash


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """What may tell how much a block is worth.

    Attributes:
        parent: The block before it in its sequence; None for the first. A block without its parent is of no use.
        position: Its index in the sequence.
        recompute_s: What computing it again takes, relative to other blocks; grows with the position.
    """

    parent: SequenceHash | None
    position: int
    recompute_s: float


class EvictionPolicy(Protocol):
    """Order of one tier's blocks."""

    def insert(self, block: SequenceHash, facts: BlockFacts) -> None:
        """The block came into the tier (it was not there)."""

    def hit(self, block: SequenceHash) -> None:
        """The block, which is in the tier, was used. Blocks of one request are told in order of position."""

    def remove(self, block: SequenceHash) -> None:
        """The block left the tier, on the policy's advice or not."""

    def victim(self, is_held: HeldCheck) -> SequenceHash | None:
        """The block that should leave next and is not held; None if all are. Changes nothing but internal order."""

    def __len__(self) -> int:
        """Blocks in the tier."""


class HeldCheck(Protocol):
    """Says whether a block must stay: leased, pinned, or being moved."""

    def __call__(self, block: SequenceHash) -> bool:
        """Whether it must stay."""
