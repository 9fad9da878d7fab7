"""All chains, found by the name of any block and by whoever holds some of them.

Blocks that nobody holds any more are dropped as soon as they end their chain. Knows nothing of events, time, budgets or
requests.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import repeat

from kelp.core.types import SequenceHash
from kelp.router.index.chains import NUM_TIERS, Chain, Reach, Span, cell_of, guess_offset, neighbours
from kelp.router.index.sharing import Sharing

MAX_CHAIN_BLOCKS = 512
"""Bounds what one bitmap operation and one search cost."""

MAX_GROWING_CELLS = 8
"""A chain with more holders is not extended but continued by another, so that a prefix that everybody has does not
change with every block that somebody appends."""


class ChainStore:
    """All chains, found by the name of any block, and by holder.

    Attributes:
        blocks: Every block that somebody holds, and those before it in its chain.
        sharing: Whose blocks count for whom; to be changed by `share`.
        num_cells: Pairs of a chain and a cell that holds some of it.
        num_levels: Entries of all cached `Chain.reach`.
    """

    def __init__(self) -> None:
        self.blocks: dict[SequenceHash, Chain] = {}
        self.sharing = Sharing()
        self.num_cells = 0
        self.num_levels = 0
        self._chains: OrderedDict[Chain, None] = OrderedDict()
        self._chains_of: dict[int, set[Chain]] = {}

    @property
    def num_chains(self) -> int:
        """Chains that somebody holds a block of."""
        return len(self._chains)

    def chains_of(self, cell: int) -> set[Chain]:
        """Chains that a cell holds blocks of; a copy."""
        return set(self._chains_of.get(cell, ()))

    def store(self, cell: int, hashes: Sequence[SequenceHash], parent: SequenceHash | None) -> list[Span]:
        """`place` and `hold`."""
        spans = self.place(cell, hashes, parent)
        for span in spans:
            self.hold(cell, span)
        return spans

    def place(self, cell: int, hashes: Sequence[SequenceHash], parent: SequenceHash | None) -> list[Span]:
        """Find consecutive blocks, adding those that are unknown; somebody must `hold` these then.

        Args:
            cell: Who is going to hold them: a hint.
            hashes: In sequence order.
            parent: The block before the first one.
        """
        spans = []
        start = 0
        while start < len(hashes):
            chain = self.blocks.get(hashes[start])
            if chain is None:
                chain, offset, count = self._append(hashes[start:] if start else hashes, parent)
            else:
                offset = chain.offset_of(hashes[start], chain.held.get(cell, 0).bit_length())
                count = chain.num_common(offset, hashes, start)
            spans.append((chain, ((1 << count) - 1) << offset))
            start += count
            parent = hashes[start - 1]
        return spans

    def _append(self, hashes: Sequence[SequenceHash], parent: SequenceHash | None) -> tuple[Chain, int, int]:
        """Add the leading unknown blocks, as many as fit."""
        blocks = self.blocks
        chain = self._growable(parent)
        offset = len(chain.hashes)
        fresh = hashes[: MAX_CHAIN_BLOCKS - offset]
        num_known = len(blocks)
        deque(map(blocks.setdefault, fresh, repeat(chain)), maxlen=0)
        if len(blocks) - num_known < len(fresh):
            fresh = self._untangle(chain, fresh)
        chain.hashes += fresh
        self._chains[chain] = None
        return chain, offset, len(fresh)

    def _untangle(self, chain: Chain, fresh: Sequence[SequenceHash]) -> Sequence[SequenceHash]:
        """The leading blocks of `fresh` that were unknown; takes the others back out of `chain`."""
        owners = [self.blocks[name] for name in fresh]
        seen = set(chain.hashes)
        count = 0
        for name, owner in zip(fresh, owners, strict=True):
            # No digest follows itself: of a worker that says so, the part that makes sense is taken.
            if owner is not chain or name in seen:
                break
            seen.add(name)
            count += 1
        for name, owner in zip(fresh[count:], owners[count:], strict=True):
            if owner is chain and name not in seen:
                self.blocks.pop(name, None)
        return fresh[:count]

    def _growable(self, parent: SequenceHash | None) -> Chain:
        chain = self.blocks.get(parent) if parent is not None else None
        if (
            chain is None
            or chain.hashes[-1] != parent
            or len(chain.hashes) >= MAX_CHAIN_BLOCKS
            or len(chain.held) > MAX_GROWING_CELLS
        ):
            return Chain()
        return chain

    def hold(self, cell: int, span: Span) -> None:
        """These blocks are held from now on."""
        chain, bits = span
        before = chain.held.get(cell, 0)
        after = before | bits
        if after == before:
            return
        if not before:
            self.num_cells += 1
            self._chains_of.setdefault(cell, set()).add(chain)
        chain.is_recent = chain.is_recent or bool(chain.held)
        chain.held[cell] = after
        if chain.reach is not None:
            self.cache(chain, None)

    def release(self, cell: int, span: Span) -> None:
        """These blocks are no longer held, as far as they were; blocks that nobody holds may be gone afterwards."""
        chain, bits = span
        before = chain.held.get(cell, 0)
        after = before & ~bits
        if after == before:
            return
        if after:
            chain.held[cell] = after
        else:
            del chain.held[cell]
            self._forget(cell, chain)
        self.cache(chain, None)
        if before.bit_length() == len(chain.hashes) and after.bit_length() < len(chain.hashes):
            self._trim(chain)

    def share(self, slot: int, holder: int | None) -> None:
        """What `holder` has counts for `slot` as well, instead of what the one before it has."""
        before = self.sharing.holder_of(slot)
        if before == holder:
            return
        self.sharing.assign(slot, holder)
        for kind in range(NUM_TIERS):
            for changed in (before, holder):
                for chain in self._chains_of.get(cell_of(changed, kind), ()) if changed is not None else ():
                    self.cache(chain, None)

    def cache(self, chain: Chain, reach: tuple[Reach, ...] | None) -> None:
        """Set `Chain.reach`."""
        if chain.reach is not None:
            self.num_levels -= sum(map(len, chain.reach))
        if reach is not None:
            self.num_levels += sum(map(len, reach))
        chain.reach = reach

    def _forget(self, cell: int, chain: Chain) -> None:
        self.num_cells -= 1
        chains = self._chains_of[cell]
        chains.discard(chain)
        if not chains:
            del self._chains_of[cell]

    def _trim(self, chain: Chain) -> None:
        """Drop the end of a chain that nobody holds."""
        length = max((bits.bit_length() for bits in chain.held.values()), default=0)
        self._shorten(chain, length)

    def _shorten(self, chain: Chain, length: int) -> None:
        deque(map(self.blocks.__delitem__, chain.hashes[length:]), maxlen=0)
        del chain.hashes[length:]
        if not length:
            del self._chains[chain]

    def spans_of(self, cell: int, hashes: Sequence[SequenceHash]) -> list[Span]:
        """Where blocks stand of which a cell holds some; any order, best if they are neighbours."""
        spans = []
        start = 0
        while start < len(hashes):
            chain = self.blocks.get(hashes[start])
            bits = chain.held.get(cell, 0) if chain is not None else 0
            if chain is None or not bits:
                start += 1
                continue
            offset = guess_offset(chain.hashes, bits, hashes, start)
            low, count = neighbours(chain.hashes, offset, hashes, start)
            spans.append((chain, ((1 << count) - 1) << low))
            start += count
        return spans

    def stale_chain(self) -> Chain:
        """The oldest chain that nothing happened to since it was made or the clock hand last passed."""
        while True:
            chain = next(iter(self._chains))
            if not chain.is_recent:
                return chain
            chain.is_recent = False
            self._chains.move_to_end(chain)

    def drop(self, chain: Chain) -> None:
        """Forget a chain, whoever holds it."""
        for cell in chain.held:
            self._forget(cell, chain)
        chain.held.clear()
        self.cache(chain, None)
        self._shorten(chain, 0)

    def compact(self) -> None:
        """Give the memory of removed entries back, which a dict keeps otherwise."""
        self.blocks = dict(self.blocks.items())
        self._chains = OrderedDict(self._chains.items())
