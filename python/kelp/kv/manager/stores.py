"""Taking blocks of workers into the host tier, in two steps.

`Store` READs what is wanted; only the worker knows whether it held the blocks all the time, so nobody is given them
before its `Commit`. A store that is never committed is dropped a lease's length after the worker's own promise ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from kelp.core.errors import ProtocolError
from kelp.core.kv_manager_messages import OfferedBlock, Store, Stored
from kelp.core.metrics import KV_TIER_REFUSED
from kelp.core.types import SequenceHash, Tier, WorkerKey
from kelp.kv.manager.host import HostTier
from kelp.kv.manager.members import Member, Members
from kelp.kv.manager.pool_reads import PoolReads
from kelp.kv.manager.states import SlotState
from kelp.kv.tiers.base import BlockRecord

StoreKey = tuple[WorkerKey, int]


@dataclass(frozen=True, slots=True)
class PendingStore:
    """Blocks that were read and wait for `Commit`."""

    slots: tuple[int, ...]
    records: tuple[BlockRecord, ...]
    deadline_s: float


class Stores:
    """All stores; belongs to one event loop.

    Args:
        on_committed: Told of blocks that have just become visible, in the order of the store.
    """

    def __init__(
        self,
        host: HostTier,
        members: Members,
        reads: PoolReads,
        on_committed: Callable[[Sequence[BlockRecord]], None],
    ) -> None:
        self._host = host
        self._members = members
        self._reads = reads
        self._on_committed = on_committed
        self._pending: dict[StoreKey, PendingStore | None] = {}
        self._coming: set[SequenceHash] = set()
        self._quarantines: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Stores that are being read or wait for `Commit`."""
        return len(self._pending)

    @property
    def num_coming(self) -> int:
        """Blocks that are being read, or are about to be."""
        return len(self._coming)

    async def store(self, member: Member, operation: Store) -> Stored:
        """Read what is wanted of the offered blocks.

        Raises:
            ProtocolError: The id is in use, or a block is outside the worker's pool.
            KelpError: The READ failed.
        """
        key = (member.key, operation.store_id)
        if key in self._pending:
            raise ProtocolError(f"store_id: {operation.store_id} of worker {member.key[0]} is in use")
        _check_blocks(operation.blocks, member.region.num_blocks)
        num_known, wanted = self._choose(operation)
        slots = self._host.shelf.reserve(operation.tenant, len(wanted))
        self._host.stats.add(KV_TIER_REFUSED, len(wanted) - len(slots), tier="host", reason="full")
        if not slots:
            return Stored(0, num_known)
        wanted = wanted[: len(slots)]
        names = {SequenceHash(block.sequence_hash) for block in wanted}
        self._coming |= names
        # None: its id is taken, but there is nothing to be committed yet.
        self._pending[key] = None
        try:
            pending = await self._fill(member, operation, wanted, slots)
        except BaseException:
            del self._pending[key]
            raise
        finally:
            self._coming -= names
        self._pending[key] = pending
        return Stored(len(pending.slots), num_known)

    def commit(self, key: StoreKey, is_valid: bool, lost: Collection[bytes] = ()) -> int | None:
        """Make a store's blocks visible, or drop them, at least the `lost` ones.

        Returns:
            How many have become visible; None if there is no such store.
        """
        pending = self._pending.get(key)
        if pending is None:
            return None
        del self._pending[key]
        settled: list[BlockRecord] = []
        for slot, record in zip(pending.slots, pending.records, strict=True):
            if not is_valid or record.sequence_hash in lost:
                self._host.shelf.drop(slot)
            elif self._host.settle(slot, record):
                settled.append(record)
        if settled:
            self._on_committed(settled)
        return len(settled)

    def cleared(self) -> None:
        """Slots of stores have been cleared under them: forget those that are gone."""
        for key, pending in list(self._pending.items()):
            if pending is not None:
                self._pending[key] = _still_stored(pending, self._host)

    def expire(self, now_s: float) -> None:
        """Drop what was never committed."""
        for key, pending in list(self._pending.items()):
            if pending is not None and pending.deadline_s <= now_s:
                self.commit(key, is_valid=False)

    def end_of(self, key: WorkerKey) -> None:
        """Drop what a worker's incarnation has not committed."""
        for store_key, pending in list(self._pending.items()):
            if store_key[0] == key and pending is not None:
                self.commit(store_key, is_valid=False)

    async def close(self) -> None:
        """Wait until nothing is quarantined any more, for a moment."""
        if self._quarantines:
            await asyncio.wait(self._quarantines, timeout=1.0)

    def _choose(self, operation: Store) -> tuple[int, list[OfferedBlock]]:
        num_known = 0
        wanted: dict[bytes, OfferedBlock] = {}
        for block in operation.blocks:
            name = SequenceHash(block.sequence_hash)
            if name in self._host.shelf:
                self._host.shelf.hit(name)
                num_known += 1
            elif name not in self._coming:
                wanted.setdefault(block.sequence_hash, block)
        return num_known, list(wanted.values())

    async def _fill(
        self, member: Member, operation: Store, wanted: Sequence[OfferedBlock], slots: Sequence[int]
    ) -> PendingStore:
        host, clock = self._host, self._host.clock
        start_s = clock.monotonic_s()
        try:
            await host.forget_stale(slots)
            left_s = operation.hold_s - (clock.monotonic_s() - start_s)
            pairs = [(block.block_id, slot) for block, slot in zip(wanted, slots, strict=True)]
            await self._reads.read(member, pairs, left_s, can_wait=not operation.is_urgent)
        except BaseException:
            self._quarantine(member, slots)
            raise
        host.stats.moved(Tier.HOST, "write", len(slots) * host.block_bytes, clock.monotonic_s() - start_s)
        names = [SequenceHash(block.sequence_hash) for block in wanted]
        try:
            checksums = await host.checksums(slots, names, can_wait=not operation.is_urgent)
        except BaseException:
            self._drop(slots)
            raise
        records = (
            BlockRecord(
                SequenceHash(block.sequence_hash),
                SequenceHash(block.parent) if block.parent else None,
                block.position,
                operation.tenant,
                checksum,
            )
            for block, checksum in zip(wanted, checksums, strict=True)
        )
        kept = [(slot, record) for slot, record in zip(slots, records, strict=True) if host.shelf.store(slot)]
        deadline_s = start_s + operation.hold_s + host.leases.ttl_s
        if member.is_gone:
            self._drop([slot for slot, _ in kept])
            kept = []
        return PendingStore(tuple(slot for slot, _ in kept), tuple(record for _, record in kept), deadline_s)

    def _quarantine(self, member: Member, slots: Sequence[int]) -> None:
        waiting = asyncio.ensure_future(self._drop_later(member, slots))
        self._quarantines.add(waiting)
        waiting.add_done_callback(self._quarantines.discard)

    async def _drop_later(self, member: Member, slots: Sequence[int]) -> None:
        await self._members.disconnect(member)
        self._drop(slots)

    def _drop(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._host.shelf.drop(slot)


def _still_stored(pending: PendingStore, host: HostTier) -> PendingStore:
    kept = [
        (slot, record)
        for slot, record in zip(pending.slots, pending.records, strict=True)
        if host.shelf.slots.state(slot) is SlotState.STORED
    ]
    return PendingStore(tuple(slot for slot, _ in kept), tuple(record for _, record in kept), pending.deadline_s)


def _check_blocks(blocks: Sequence[OfferedBlock], num_blocks: int) -> None:
    for block in blocks:
        if block.block_id >= num_blocks:
            raise ProtocolError(f"blocks: block_id {block.block_id} is outside the pool of {num_blocks} blocks")
        if len(block.parent) not in (0, 16):
            raise ProtocolError(f"blocks: parent has {len(block.parent)} bytes, must be 0 or 16")
