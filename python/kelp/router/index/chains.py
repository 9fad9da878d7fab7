"""Blocks laid out as chains: consecutive blocks of one sequence, and who holds which of them.

A name is a digest chained over everything before it (`core.hashing`), so two sequences that agree in one block agree
in all blocks before it. That is what makes a chain cheap: how far a prompt follows it is a binary search, and who holds
it is one bitmap per holder, of any shape. Nothing is assumed about residency: a worker may lack a block in the middle,
and blocks may come before their parent.

Knows nothing of events, time, budgets or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from kelp.core.types import SequenceHash, Tier

NUM_TIERS = len(Tier)
EXPECTED = NUM_TIERS
"""Kind of a cell for what a worker is expected to hold in `Tier.DEVICE`; smaller kinds are tiers."""

_KIND_BITS = 3
_KIND_MASK = (1 << _KIND_BITS) - 1


def cell_of(slot: int, kind: int) -> int:
    """Key of what one worker or manager (`sharing`) has in one tier, or is expected to have."""
    return slot << _KIND_BITS | kind


def slot_of(cell: int) -> int:
    """Inverse of `cell_of`."""
    return cell >> _KIND_BITS


def kind_of(cell: int) -> int:
    """Inverse of `cell_of`."""
    return cell & _KIND_MASK


def is_device(cell: int) -> bool:
    """Whether this is what a worker has in `Tier.DEVICE`."""
    return cell >= 0 and not cell & _KIND_MASK


Reach = list[tuple[int, int]]
"""`(blocks, slots)`: the set of slots (bit mask) that hold at least so many leading blocks, most blocks first."""


class Chain:
    """One chain.

    Attributes:
        hashes: Names of its blocks.
        held: By cell, a bitmap over `hashes`: never zero.
        reach: Cache of `reach.reaches_of`; None once `held` has changed.
        fork: Blocks in common with the last sequence that left it in the middle: the next one likely leaves there too.
        is_recent: Matched, extended or held by one more since the clock hand last passed (`ChainStore.stale_chain`).
    """

    __slots__ = ("fork", "hashes", "held", "is_recent", "reach")

    def __init__(self) -> None:
        self.hashes: list[SequenceHash] = []
        self.held: dict[int, int] = {}
        self.reach: tuple[Reach, ...] | None = None
        self.is_recent = False
        self.fork = 0

    def offset_of(self, name: SequenceHash, guess: int) -> int:
        """Where a block of this chain stands; `guess` saves the search."""
        hashes = self.hashes
        if guess < len(hashes) and hashes[guess] == name:
            return guess
        return hashes.index(name)

    def num_common(self, offset: int, hashes: Sequence[SequenceHash], start: int) -> int:
        """Blocks from `hashes[start]` on, which stands at `offset`, that follow this chain."""
        mine = self.hashes
        most = len(mine) - offset
        if len(hashes) - start < most:
            most = len(hashes) - start
        if mine[offset + most - 1] == hashes[start + most - 1]:
            return most
        low, high = 1, most - 1
        fork = self.fork - offset
        if low <= fork <= high and mine[self.fork - 1] == hashes[start + fork - 1]:
            if mine[self.fork] != hashes[start + fork]:
                return fork
            low = fork
        while low < high:
            middle = (low + high + 1) // 2
            if mine[offset + middle - 1] == hashes[start + middle - 1]:
                low = middle
            else:
                high = middle - 1
        self.fork = offset + low
        return low


Span = tuple[Chain, int]
"""Blocks of one chain, as a bitmap over it."""


def guess_offset(mine: Sequence[SequenceHash], bits: int, hashes: Sequence[SequenceHash], start: int) -> int:
    """Workers evict from the end: try the last block held, then as many before it as are asked for."""
    last = bits.bit_length() - 1
    name = hashes[start]
    if mine[last] == name:
        return last
    first = last + 1 - (len(hashes) - start)
    if first >= 0 and mine[first] == name:
        return first
    return mine.index(name)


def neighbours(
    mine: Sequence[SequenceHash], offset: int, hashes: Sequence[SequenceHash], start: int
) -> tuple[int, int]:
    """`(lowest offset, number)` of blocks from `hashes[start]` on that stand in a row, forwards or backwards."""
    most = min(len(hashes) - start, len(mine))
    if most == 1:
        return offset, 1
    second = hashes[start + 1]
    if offset + 1 < len(mine) and mine[offset + 1] == second:
        return offset, _num_equal(mine[offset : offset + most], list(hashes[start : start + most]))
    if not offset or mine[offset - 1] != second:
        return offset, 1
    backwards = mine[max(0, offset - most + 1) : offset + 1][::-1]
    count = _num_equal(backwards, list(hashes[start : start + most]))
    return offset - count + 1, count


def _num_equal(one: Sequence[SequenceHash], other: Sequence[SequenceHash]) -> int:
    """Leading names in common."""
    if one == other:
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((count for count, (name, other_name) in pairs if name != other_name), len(one))
