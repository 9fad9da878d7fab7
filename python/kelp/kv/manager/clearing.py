"""Removing a tenant's blocks from every tier, to the end: also when the store is away or the manager is killed.

A clear is written down before it begins. Where it cannot be finished now, it is finished later: after a restart by the
next manager, before it gives anybody a block; in a store that is away, once that is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from kelp.core.errors import KelpError, RetryableTransferError
from kelp.core.types import Tier
from kelp.kv.manager.host import HostTier
from kelp.kv.manager.lower import DiskSide, StoreSide
from kelp.kv.manager.stores import Stores
from kelp.kv.tiers.clears import LOWER_TIERS, ClearJournal, OwedClear

_log = logging.getLogger(__name__)
WIPE_AGAIN_S = 10.0
"""Between two tries to wipe what the disk could not."""


@dataclass(eq=False)
class _Clear:
    """One that is under way.

    Attributes:
        tiers: Those that it has not reached yet.
        is_inherited: Whether it was asked of an earlier manager.
        is_on_disk: Whether it has come to the disk, which wipes what it could not wipe at once when it can.
        is_in_store: Whether the store side knows of it, and owes it if it could not do it.
    """

    tenant: bytes | None
    tiers: set[Tier]
    is_inherited: bool = False
    is_on_disk: bool = False
    is_in_store: bool = False


class Clearing:
    """All clears of a space; belongs to one event loop.

    Args:
        journal: None where nothing outlives the manager.
    """

    def __init__(
        self, host: HostTier, stores: Stores, disk: DiskSide | None, store: StoreSide | None,
        journal: ClearJournal | None,
    ) -> None:  # fmt: skip
        self._host = host
        self._stores = stores
        self._disk = disk
        self._store = store
        self._journal = journal
        self._owed: list[_Clear] = []
        # Of tiers that are not configured now: kept for when they are again.
        self._elsewhere: list[OwedClear] = []
        self._wiping_again_s = 0.0
        self._writing = asyncio.Lock()

    def __len__(self) -> int:
        """Clears that are not finished."""
        return len(self._owed)

    def inherited(self, tier: Tier) -> list[bytes | None]:
        """Whose blocks an earlier manager has not removed from a tier: nobody may find them again."""
        return [clear.tenant for clear in self._owed if clear.is_inherited and tier in clear.tiers]

    async def load(self) -> None:
        """Learn what an earlier manager has left undone; `finish` does it."""
        if self._journal is not None:
            found = await asyncio.to_thread(self._journal.load)
            self._owed = [_Clear(one.tenant, self._known(one.tiers), is_inherited=True) for one in found]
            unknown = [OwedClear(one.tenant, one.tiers - self._known(one.tiers)) for one in found]
            self._elsewhere = [one for one in unknown if one.tiers]

    async def finish(self) -> None:
        """Do what an earlier manager has left undone."""
        for clear in list(self._owed):
            try:
                num_blocks = await self._carry_out(clear)
                _log.info("%d KV blocks of an unfinished clear are gone", num_blocks)
            except KelpError as error:
                _log.warning("an unfinished clear of KV blocks goes on later: %s", error)

    async def clear(self, tenant: bytes | None, tiers: Iterable[Tier]) -> int:
        """Remove a tenant's blocks (None: everybody's) from these tiers (empty: all); how many could be found here.

        Raises:
            RetryableTransferError: The store could not be reached, or the disk took no wipe: that is done later.
        """
        clear = _Clear(tenant, self._known(tiers or LOWER_TIERS))
        self._owed.append(clear)
        await self._write_down()
        return await self._carry_out(clear)

    async def sweep(self) -> None:
        """See whether the disk has wiped what it owed, and have it try again from time to time."""
        owed = [clear for clear in self._owed if clear.is_on_disk and Tier.DISK in clear.tiers]
        if self._disk is None or not owed:
            return
        now_s = self._host.clock.monotonic_s()
        if not self._disk.owes_wipes:
            for clear in owed:
                clear.tiers.discard(Tier.DISK)
            await self._settle()
        elif now_s >= self._wiping_again_s:
            self._wiping_again_s = now_s + WIPE_AGAIN_S
            self._disk.wipe_again()

    async def reached(self) -> None:
        """The store has been asked again to delete what it owed: see what is left."""
        asked = [clear for clear in self._owed if clear.is_in_store]
        if self._store is None or not asked:
            return
        left = await self._store.owed()
        for clear in asked:
            if clear.tenant not in left:
                clear.tiers.discard(Tier.OBJECT)
        await self._settle()

    def _known(self, tiers: Iterable[Tier]) -> set[Tier]:
        known = {Tier.HOST}
        if self._disk is not None:
            known.add(Tier.DISK)
        if self._store is not None:
            known.add(Tier.OBJECT)
        return known.intersection(tiers)

    async def _carry_out(self, clear: _Clear) -> int:
        wanted, faults = frozenset(clear.tiers), []
        num_removed = 0
        if Tier.HOST in wanted:
            num_removed += self._host.shelf.clear(clear.tenant)
            self._stores.cleared()
            await self._host.wiped()
            clear.tiers.discard(Tier.HOST)
        if Tier.DISK in wanted and self._disk is not None:
            num_removed += await self._disk.clear(clear.tenant)
            clear.is_on_disk = True
            if self._disk.owes_wipes:
                faults.append("bytes are left on disk, which does not take a wipe now")
        if Tier.OBJECT in wanted and self._store is not None:
            try:
                num_removed += await self._store.clear(clear.tenant)
            except KelpError as error:
                faults.append(f"what the store has is left: {error.text}")
            clear.is_in_store = True
        await self.sweep()
        await self.reached()
        await self._settle()
        if faults:
            raise RetryableTransferError(
                f"clear: {num_removed} blocks are gone, but {'; '.join(faults)}. It is finished as soon as it can be"
            )
        return num_removed

    async def _settle(self) -> None:
        """Forget what is finished, and what another clear that is under way does as well."""
        unfinished = {(clear.tenant, frozenset(clear.tiers)): clear for clear in self._owed if clear.tiers}
        self._owed = list(unfinished.values())
        await self._write_down()

    async def _write_down(self) -> None:
        if self._journal is None:
            return
        async with self._writing:
            owed = [OwedClear(clear.tenant, frozenset(clear.tiers)) for clear in self._owed]
            try:
                await asyncio.to_thread(self._journal.save, [*owed, *self._elsewhere])
            except OSError as error:
                _log.error("%d clears of KV blocks would not outlive this process: %s", len(owed), error)
