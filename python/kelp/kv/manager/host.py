"""The host tier: books, leases and content of the arena that workers READ from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from kelp.core.kv_manager_values import SlotRef
from kelp.core.types import SequenceHash, Tier
from kelp.kv.manager.books import BookParts, TierBooks
from kelp.kv.manager.leases import LeaseTable
from kelp.kv.manager.threads import TierThread
from kelp.kv.tiers.base import BlockRecord, HostArena

_VERIFIED_AT_ONCE_BYTES = 8 * 1024 * 1024


class HostTier(TierBooks):
    """Tier G2; belongs to one event loop.

    What an earlier process left is unverified: it is checked before anybody is given it, and in the background.
    """

    def __init__(self, arena: HostArena, lease_ttl_s: float, parts: BookParts) -> None:
        super().__init__(Tier.HOST, arena, parts)
        self.arena = arena
        # Of its own, so that the calls that somebody waits for need not.
        self.background = TierThread("kelp-kv-checksums", can_wait=True)
        self.leases = LeaseTable(parts.clock, lease_ttl_s, self.shelf.release)
        self._unverified: dict[SequenceHash, None] = {}
        self._to_commit: list[tuple[int, BlockRecord]] = []
        self._committed: asyncio.Future[None] | None = None

    @property
    def num_unverified(self) -> int:
        """Blocks whose content nobody has looked at since the start."""
        return len(self._unverified)

    def is_unverified(self, name: SequenceHash) -> bool:
        """Whether nobody has looked at the block's content since the start."""
        return name in self._unverified

    def left(self, record: BlockRecord, reason: str) -> None:
        """See `ShelfWatch`."""
        self._unverified.pop(record.sequence_hash, None)
        super().left(record, reason)

    def settle(self, slot: int, record: BlockRecord) -> bool:
        """The slot holds this block from now on; see `Shelf.settle`. `written` waits until that survives a crash."""
        if not self.shelf.settle(slot, record):
            return False
        if not self._to_commit:
            asyncio.get_running_loop().call_soon(self._start_committing)
        self._to_commit.append((slot, record))
        return True

    async def written(self) -> None:
        """Wait until everything settled by now is found again after a crash."""
        self._start_committing()
        if self._committed is not None:
            await asyncio.wait({self._committed})

    async def forget_stale(self, slots: Sequence[int]) -> None:
        """See `TierBooks`."""
        # Records that wait to be written must not follow the clearing of their slots.
        self._start_committing()
        await super().forget_stale(slots)

    async def checksums(
        self, slots: Sequence[int], names: Sequence[SequenceHash], can_wait: bool = False
    ) -> list[bytes]:
        """Checksums of what lies in the slots, as the blocks of these names."""
        arena = self.arena
        pairs = list(zip(slots, names, strict=True))
        thread = self.background if can_wait else self.thread
        return await thread.run(lambda: [arena.checksum(slot, name) for slot, name in pairs])

    def reference(self, slot: int) -> SlotRef:
        """A held slot, as a worker is told of it."""
        return SlotRef(slot, self.shelf.record(slot).checksum)

    async def recover(self, owed: Callable[[], Iterable[bytes | None]] = tuple) -> int:
        """See `TierBooks`."""
        num_recovered = await super().recover(owed)
        self._unverified = dict.fromkeys(self.shelf.names())
        return num_recovered

    async def verify(self, names: Sequence[SequenceHash]) -> None:
        """Check those that were not checked yet; the damaged ones are gone afterwards."""
        slots = {
            name: slot for name in names if name in self._unverified and (slot := self.shelf.slot(name)) is not None
        }
        if not slots:
            return
        for slot in slots.values():
            self.shelf.hold(slot)
        try:
            found = await self.checksums(list(slots.values()), list(slots))
            for (name, slot), checksum in zip(slots.items(), found, strict=True):
                self._unverified.pop(name, None)
                if self.shelf.slot(name) == slot and checksum != self.shelf.record(slot).checksum:
                    self.found_corrupt(name)
        finally:
            for slot in slots.values():
                self.shelf.release(slot)

    async def verify_some(self) -> list[BlockRecord]:
        """Check a few of those that were not checked yet; returns the sound ones among them."""
        step = max(1, _VERIFIED_AT_ONCE_BYTES // self.block_bytes)
        names = [name for _, name in zip(range(step), self._unverified, strict=False)]
        await self.verify(names)
        slots = [self.shelf.slot(name) for name in names]
        return [self.shelf.record(slot) for slot in slots if slot is not None]

    def _start_committing(self) -> None:
        pairs, self._to_commit = self._to_commit, []
        if pairs:
            self._committed = self.thread.start(_commit_all, self.arena, pairs)


def _commit_all(arena: HostArena, pairs: Sequence[tuple[int, BlockRecord]]) -> None:
    for slot, record in pairs:
        arena.commit(slot, record)
