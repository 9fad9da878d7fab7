"""The most that any eviction policy could save, knowing the future: a bound from above, not a policy.

Claim: `clairvoyant_s` sums to no less than `sim.eviction.replay` does with any policy and that many slots.

A block saves its cost when it is asked for and was kept since it was last asked for (a tier gets blocks only when they
are asked for). For hits that all count the same, keeping after each request those blocks that are asked for soonest is
best (Belady, "A study of replacement algorithms for a virtual-storage computer", 1966; the exchange argument holds as
well where a block need not be kept at all, and where several are asked for at once). Costs differ, but depend on the
position alone and are written as sums of steps: with positions split into levels, a hit counts at most the highest
cost of its level, that is the sum of this figure's rises over all levels up to its own. So what a policy saves is at
most the sum over levels of the rise times the hits at positions of that level or beyond; and those are at most
Belady's, who is given the whole tier for blocks of these positions alone.

Left out, each only making the bound higher: that a hit needs all blocks before it, that blocks of the running request
can't leave, that a stored block must push out another, and that all levels share one tier. It is reached where costs
are equal, because a block is asked for no later than what follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from kelp.core.types import SequenceHash
from kelp.sim.eviction import Stream

_LEVEL_GROWTH = 1.5
"""A level has about half as many positions as lie before it: finer ones hardly lower the bound."""


def clairvoyant_s(stream: Stream, num_slots: int) -> list[float]:
    """Seconds of prefill by request; only their sum means something, see the module docstring."""
    saved_s = [0.0] * len(stream.requests)
    counted_s = 0.0
    for start, stop in _levels(len(stream.costs_s)):
        highest_s = max(stream.costs_s[start:stop])
        rise_s, counted_s = highest_s - counted_s, highest_s
        for index, num_hits in enumerate(_most_hits(stream, num_slots, start)):
            saved_s[index] += rise_s * num_hits
    return saved_s


def _levels(num_positions: int) -> list[tuple[int, int]]:
    edges = [0]
    while edges[-1] < num_positions:
        edges.append(min(num_positions, max(edges[-1] + 1, int(edges[-1] * _LEVEL_GROWTH))))
    return list(zip(edges, edges[1:], strict=False))


def _most_hits(stream: Stream, num_slots: int, least_position: int) -> list[int]:
    """Belady's hits by request, where only blocks from a position on count."""
    asked = [blocks[max(first, least_position) :] for first, blocks in stream.requests]
    following = _next_requests(asked)
    kept: dict[SequenceHash, int] = {}
    latest_first: list[tuple[int, SequenceHash]] = []
    hits = []
    for blocks, nexts in zip(asked, following, strict=True):
        num_hits = 0
        for block, following_index in zip(blocks, nexts, strict=True):
            num_hits += kept.pop(block, None) is not None
            if following_index is not None:
                kept[block] = following_index
                heappush(latest_first, (-following_index, block))
        while len(kept) > num_slots:
            negative_index, block = heappop(latest_first)
            if kept.get(block) == -negative_index:
                del kept[block]
        hits.append(num_hits)
    return hits


def _next_requests(asked: Sequence[Sequence[SequenceHash]]) -> list[list[int | None]]:
    """For each block of each request, the request that asks for it next; None if there is none."""
    upcoming: dict[SequenceHash, int] = {}
    following: list[list[int | None]] = []
    for index in range(len(asked) - 1, -1, -1):
        following.append([upcoming.get(block) for block in asked[index]])
        upcoming.update(dict.fromkeys(asked[index], index))
    following.reverse()
    return following
