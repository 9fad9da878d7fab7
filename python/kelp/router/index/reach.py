"""How many leading blocks of a prompt each holder has: the walk from chain to chain.

Sets of slots are bit masks, so that the cost follows the number of chains and of different depths, hardly that of
workers. As long as nothing but `Tier.DEVICE` is met, all tiers are one; from there on views are followed apart, those
that agree as one.

What a KV block manager holds is joined with what each of its workers holds block by block, so a prefix that lies half
with the worker and half with the manager counts whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kelp.core.types import SequenceHash, Tier
from kelp.router.index.chain_store import ChainStore
from kelp.router.index.chains import EXPECTED, NUM_TIERS, Chain, Reach, is_device, kind_of, slot_of
from kelp.router.index.sharing import Sharing, is_shared

Depths = list[tuple[int, int]]
"""`(blocks, slots)`: the set of slots (bit mask) that hold exactly so many leading blocks; disjoint, none of zero."""

KNOWN = NUM_TIERS
"""Index of the last view: device blocks without those that are only expected."""

_NUM_VIEWS = NUM_TIERS + 1
_EVERYBODY = -1

_Track = tuple[int, Depths]
"""Who has held every block so far, and where the others stopped."""


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
    store: ChainStore, hashes: Sequence[SequenceHash], position: int, so_far: _Track
) -> tuple[Depths, ...]:
    """`depths_of` from the first chain on where views differ."""
    tracks = [so_far] * _NUM_VIEWS
    while position < len(hashes) and any([alive for alive, _ in tracks]):
        chain = store.blocks.get(hashes[position])
        if chain is None or chain.hashes[0] != hashes[position]:
            break
        chain.is_recent = True
        reaches = chain.reach or _refresh(store, chain)
        if len(reaches) == 1:
            reaches *= _NUM_VIEWS
        count = chain.num_common(0, hashes, position)
        followed: dict[tuple[int, int], _Track] = {}
        for view, (track, reach) in enumerate(zip(tracks, reaches, strict=True)):
            both = id(track), id(reach)
            if both not in followed:
                stopped = list(track[1])
                followed[both] = _follow(reach, track[0], (position, count), stopped), stopped
            tracks[view] = followed[both]
        position += count
    for alive, stopped in {id(track): track for track in tracks}.values():
        if position and alive:
            stopped.append((position, alive))
    return tuple([stopped for _, stopped in tracks])


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
    reaches = reaches_of(chain, store.sharing)
    store.cache(chain, reaches)
    return reaches


def reaches_of(chain: Chain, sharing: Sharing) -> tuple[Reach, ...]:
    """Leading blocks of a chain by view; one view where the holders know nothing but `Tier.DEVICE`."""
    held = chain.held
    if all(map(is_device, held)):
        return (_reach([(1 << slot_of(cell), bits) for cell, bits in held.items()]),)
    kinds: list[list[tuple[int, int]]] = [[] for _ in range(_NUM_VIEWS)]
    for cell, bits in held.items():
        kinds[kind_of(cell)].append((slot_of(cell), bits))
    own = {slot: bits for slot, bits in kinds[Tier.DEVICE] if not is_shared(slot)}
    known = _reach([(1 << slot, bits) for slot, bits in own.items()]) if kinds[EXPECTED] else None
    for slot, bits in kinds[EXPECTED]:
        own[slot] = own.get(slot, 0) | bits
    below: dict[int, int] = {}
    reaches = [_reach([(1 << slot, bits) for slot, bits in own.items()])]
    for tier in Tier:
        if tier != Tier.DEVICE:
            for slot, bits in kinds[tier]:
                holdings = below if is_shared(slot) else own
                holdings[slot] = holdings.get(slot, 0) | bits
            reaches.append(_reach(_joined(own, below, sharing)) if kinds[tier] else reaches[-1])
    return (*reaches, reaches[0] if known is None else known)


def _joined(own: dict[int, int], below: dict[int, int], sharing: Sharing) -> Iterable[tuple[int, int]]:
    """What workers hold, each with its manager; those of one manager that hold nothing themselves are one set."""
    holding = 0
    for slot, bits in own.items():
        holder = sharing.holder_of(slot)
        holding |= 1 << slot
        yield 1 << slot, bits if holder is None else bits | below.get(holder, 0)
    for holder, bits in below.items():
        rest = sharing.members_of(holder) & ~holding
        if rest:
            yield rest, bits


def _reach(holders: Iterable[tuple[int, int]]) -> Reach:
    masks: dict[int, int] = {}
    for slots, bits in holders:
        extent = (~bits & (bits + 1)).bit_length() - 1
        if extent:
            masks[extent] = masks.get(extent, 0) | slots
    reach = []
    mask = 0
    for extent in sorted(masks, reverse=True):
        mask |= masks[extent]
        reach.append((extent, mask))
    return reach
