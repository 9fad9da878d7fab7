"""How consecutive blocks of a sequence fall into groups: group *i* is its blocks `[i * n, (i + 1) * n)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kelp.core.types import SequenceHash


@dataclass
class GroupRun:
    """Consecutive blocks of one group that are wanted.

    Attributes:
        start: Index of the first in the caller's list.
        first: Its index in the group.
        last: Name of the group's last block, wanted or not.
    """

    start: int
    first: int
    last: SequenceHash
    names: list[SequenceHash] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)


def group_ends(num_blocks: int, first_position: int, group_blocks: int) -> range:
    """Indices of the last blocks of groups, among `num_blocks` blocks that begin at a position of their sequence."""
    return range(group_blocks - 1 - first_position % group_blocks, num_blocks, group_blocks)


def group_runs(
    moves: Sequence[tuple[SequenceHash, int]],
    first_position: int,
    group_blocks: int,
    end_of: Callable[[SequenceHash], SequenceHash | None],
) -> Iterator[GroupRun]:
    """Blocks and their slots by group; `moves` are consecutive blocks, the first one at `first_position`.

    `end_of` names the last block of a group that `moves` does not reach the end of; if it cannot, the group is skipped.
    """
    start = 0
    while start < len(moves):
        first = (first_position + start) % group_blocks
        stop = start + group_blocks - first
        last = moves[stop - 1][0] if stop <= len(moves) else end_of(moves[start][0])
        if last is not None:
            names, slots = zip(*moves[start:stop], strict=True)
            yield GroupRun(start, first, last, list(names), list(slots))
        start = stop


def spread(count: int, most: int) -> list[int]:
    """Up to `most` (at least 2) of `count` indices, evenly spread, the first and the last of them included."""
    if count <= most:
        return list(range(count))
    return [step * (count - 1) // (most - 1) for step in range(most)]
