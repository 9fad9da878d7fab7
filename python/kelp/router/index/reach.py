"""How many leading blocks of a prompt each holder has: the walk from chain to chain.

Sets of slots are bit masks, so that the cost follows the number of chains and of different depths, hardly that of
workers. As long as nothing but `Tier.DEVICE` is met, all tiers are one; from there on each view is followed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from kelp.core.types import SequenceHash, Tier
from kelp.router.index.chain_store import ChainStore
from kelp.router.index.chains import EXPECTED, NUM_TIERS, Chain, Reach, kind_of, slot_of

Depths = list[tuple[int, int]]
"""`(blocks, slots)`: the set of slots (bit mask) that hold exactly so many leading blocks; disjoint, none of zero."""

KNOWN = NUM_TIERS
"""Index of the last view: device blocks without those that are only expected."""

_NUM_VIEWS = NUM_TIERS + 1
_EVERYBODY = -1


def depths_of(store: ChainStore, hashes: Sequence[SequenceHash]) -> tuple[Depths, ...]:
    """Follow a prompt.

    Returns:
        One entry where all views agree; else one per tier (this or a faster one, expectations included) and `KNOWN`.
    """
    find = store.blocks.get
    stopped: Depths = []
    alive = _EVERYBODY
    position = 0
    while position < len(hashes) and alive:
        chain = find(hashes[position])
        if chain is None or chain.hashes[0] != hashes[position]:
            break
        reaches = chain.reach or _refresh(store, chain)
        if len(reaches) > 1:
            return _depths_by_view(store, hashes, position, (alive, stopped))
        chain.is_recent = True
        count = chain.num_common(0, hashes, position)
        alive = _follow(reaches[0], alive, (position, count), stopped)
        position += count
    if position and alive:
        stopped.append((position, alive))
    return (stopped,)


def _depths_by_view(
    store: ChainStore, hashes: Sequence[SequenceHash], position: int, so_far: tuple[int, Depths]
) -> tuple[Depths, ...]:
    """`depths_of` from the first chain on where views differ."""
    alive = [so_far[0]] * _NUM_VIEWS
    stopped = [list(so_far[1]) for _ in range(_NUM_VIEWS)]
    while position < len(hashes) and any(alive):
        chain = store.blocks.get(hashes[position])
        if chain is None or chain.hashes[0] != hashes[position]:
            break
        chain.is_recent = True
        reaches = chain.reach or _refresh(store, chain)
        count = chain.num_common(0, hashes, position)
        for view in range(_NUM_VIEWS):
            reach = reaches[view] if len(reaches) > 1 else reaches[0]
            alive[view] = _follow(reach, alive[view], (position, count), stopped[view])
        position += count
    if position:
        for view in range(_NUM_VIEWS):
            if alive[view]:
                stopped[view].append((position, alive[view]))
    return tuple(stopped)


def _follow(reach: Reach, alive: int, step: tuple[int, int], stopped: Depths) -> int:
    """Slots of `alive` that hold the `count` blocks of a step from `position`; notes where the others stop."""
    position, count = step
    through = 0
    for extent, mask in reach:
        if extent >= count:
            through = alive & mask
            if through == alive:
                return through
            continue
        halted = alive & mask & ~through
        if halted:
            stopped.append((position + extent, halted))
            alive &= ~halted
    rest = alive & ~through
    if position and rest:
        stopped.append((position, rest))
    return through


def _refresh(store: ChainStore, chain: Chain) -> tuple[Reach, ...]:
    reaches = reaches_of(chain)
    store.cache(chain, reaches)
    return reaches


def reaches_of(chain: Chain) -> tuple[Reach, ...]:
    """Leading blocks of a chain by view; one view where the holders know nothing but `Tier.DEVICE`."""
    if all(kind_of(cell) == Tier.DEVICE for cell in chain.held):
        return (_reach([(slot_of(cell), bits) for cell, bits in chain.held.items()]),)
    by_slot: dict[int, list[int]] = {}
    for cell, bits in chain.held.items():
        by_slot.setdefault(slot_of(cell), [0] * _NUM_VIEWS)[kind_of(cell)] = bits
    views: list[list[tuple[int, int]]] = [[] for _ in range(_NUM_VIEWS)]
    for slot, kinds in by_slot.items():
        views[KNOWN].append((slot, kinds[Tier.DEVICE]))
        bits = kinds[EXPECTED]
        for tier in Tier:
            bits |= kinds[tier]
            views[tier].append((slot, bits))
    return tuple(_reach(view) for view in views)


def _reach(holders: list[tuple[int, int]]) -> Reach:
    masks: dict[int, int] = {}
    for slot, bits in holders:
        extent = (~bits & (bits + 1)).bit_length() - 1
        if extent:
            masks[extent] = masks.get(extent, 0) | 1 << slot
    reach = []
    mask = 0
    for extent in sorted(masks, reverse=True):
        mask |= masks[extent]
        reach.append((extent, mask))
    return reach
