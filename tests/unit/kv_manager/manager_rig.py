"""A block manager over tiers in memory and the local transport, with workers whose pools hold known bytes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from fake_tiers import ArenaMemory, DiskMemory, FakeArena, FakeDisk, FakeObjects, StoreMemory

from kelp.core.clock import Clock, SystemClock
from kelp.core.config import KelpConfig, load_config
from kelp.core.hashing import seed_hash, sequence_hashes, tenant_digest
from kelp.core.kv_manager_messages import (
    Await,
    Commit,
    Join,
    Joined,
    Leased,
    OfferedBlock,
    Onboard,
    Operation,
    PoolRecord,
    Release,
    Result,
    SpaceRecord,
    Store,
    Stored,
)
from kelp.core.metrics import Metrics
from kelp.core.types import BlockId, SequenceHash
from kelp.kv.eviction.catalogue import make_policy
from kelp.kv.manager.parts import ManagerParts, Tiers
from kelp.kv.manager.service import KvBlockManager
from kelp.kv.manager.space import Space
from kelp.kv.tiers.clears import ClearJournal
from kelp.transport.base import Region, TransferState
from kelp.transport.local import LocalAgent, ReadFaults
from support.waiting import until

SPACE = SpaceRecord(
    num_layers=1, num_kv_heads=1, block_size=4, head_dim=2, dtype="float32", model_id="m", hash_version=1
)
BLOCK_BYTES = 64
TENANT = tenant_digest("")
ResultT = TypeVar("ResultT", bound=Result)


def prompt_hashes(num_blocks: int, salt: str = "", first_token: int = 0) -> list[SequenceHash]:
    """Names of a prompt's blocks."""
    tokens = np.arange(first_token, first_token + 4 * num_blocks, dtype=np.int32)
    return sequence_hashes(tokens, 4, seed_hash("m", cache_salt=salt))


def content_of(name: SequenceHash) -> bytes:
    """The bytes that computing a block gives."""
    return (name * (BLOCK_BYTES // len(name)))[:BLOCK_BYTES]


@dataclass
class Host:
    """What outlives managers."""

    num_slots: int = 8
    num_disk_slots: int = 0
    store: StoreMemory | None = None
    settings: dict[str, str] = field(default_factory=dict)
    clock: Clock = field(default_factory=SystemClock)
    faults: ReadFaults = field(default_factory=ReadFaults)
    journal: Path | None = None

    def __post_init__(self) -> None:
        self.memory = ArenaMemory.new(self.num_slots, BLOCK_BYTES)
        self.disk_memory = DiskMemory(self.num_disk_slots) if self.num_disk_slots else None
        self.metrics = Metrics()
        self.arena: FakeArena | None = None
        self.disk: FakeDisk | None = None
        self.objects: FakeObjects | None = None

    def open_tiers(self, space: SpaceRecord, block_bytes: int) -> Tiers:
        assert block_bytes == BLOCK_BYTES
        arena = self.arena = FakeArena(self.memory)
        self.disk = FakeDisk(self.disk_memory, arena) if self.disk_memory is not None else None
        self.objects = FakeObjects(self.store, arena) if self.store is not None else None
        journal = ClearJournal(self.journal) if self.journal is not None else None
        return Tiers(arena, self.disk, self.objects, journal)

    def config(self) -> KelpConfig:
        return load_config({"events.enabled": "false", "kv_manager.eviction": "lru", **self.settings})

    def parts(self) -> ManagerParts:
        config = self.config()
        return ManagerParts(
            open_tiers=self.open_tiers,
            open_agent=lambda: LocalAgent("manager", self.faults),
            make_policy=lambda num_slots: make_policy(config.kv_manager.eviction, num_slots),
            config=config,
            clock=self.clock,
            metrics=self.metrics,
        )

    @contextlib.asynccontextmanager
    async def manager(self, is_kept: bool = False) -> AsyncIterator[KvBlockManager]:
        manager = KvBlockManager(self.parts())
        try:
            yield manager
        finally:
            await manager.stop(is_kept)


class Worker:
    """A worker's pool and its conversation with the manager."""

    def __init__(self, manager: KvBlockManager, name: str = "w", epoch: str = "e1", num_blocks: int = 32) -> None:
        self._manager = manager
        self.worker_id, self.epoch = name, epoch
        self.pool = np.zeros((num_blocks, BLOCK_BYTES), dtype=np.uint8)
        self._agent = LocalAgent(name)
        self._agent.register(Region(self.pool.ctypes.data, num_blocks, BLOCK_BYTES, "cpu"), self.pool)
        self._next_id = 0
        self.joined: Joined | None = None

    async def ask(self, operation: Operation) -> Result:
        (result,) = await self._manager.answer([operation])
        return result

    def join_operation(self, space: SpaceRecord = SPACE) -> Join:
        pool = PoolRecord(
            self._agent.metadata(), self.pool.ctypes.data, len(self.pool), BLOCK_BYTES, BLOCK_BYTES, "cpu"
        )
        return Join(self.worker_id, self.epoch, space, pool)

    async def join(self, space: SpaceRecord = SPACE) -> Joined:
        result = await self.ask(self.join_operation(space))
        assert isinstance(result, Joined), result
        self.joined = result
        return result

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def compute(self, hashes: Sequence[SequenceHash]) -> list[OfferedBlock]:
        """Put the right bytes into the first blocks of the pool."""
        offered = []
        for position, name in enumerate(hashes):
            self.pool[position] = np.frombuffer(content_of(name), dtype=np.uint8)
            parent = hashes[position - 1] if position else b""
            offered.append(OfferedBlock(name, parent, position, position))
        return offered

    def store_operation(
        self, hashes: Sequence[SequenceHash], tenant: bytes = TENANT, hold_s: float = 5.0, first: int = 0
    ) -> Store:
        blocks = tuple(self.compute(hashes)[first:])
        return Store(self.worker_id, self.epoch, self.new_id(), tenant, hold_s, blocks)

    async def store(self, hashes: Sequence[SequenceHash], tenant: bytes = TENANT) -> Result:
        """Store and commit."""
        operation = self.store_operation(hashes, tenant)
        result = await self.ask(operation)
        assert isinstance(result, Stored), result
        return await self.commit(operation.store_id)

    async def commit(self, store_id: int, is_valid: bool = True) -> Result:
        return await self.ask(Commit(self.worker_id, self.epoch, store_id, is_valid))

    def onboard_operation(
        self, hashes: Sequence[SequenceHash], tenant: bytes = TENANT, recompute_s: float = 0.0, timeout_s: float = 5.0
    ) -> Onboard:
        return Onboard(self.worker_id, self.epoch, self.new_id(), tenant, tuple(hashes), 0, recompute_s, timeout_s)

    async def onboard(self, hashes: Sequence[SequenceHash], tenant: bytes = TENANT) -> tuple[int, Leased]:
        """Wait for all that comes; returns the lease's id and how it stands in the end, `ready` being complete."""
        operation = self.onboard_operation(hashes, tenant)
        leased = await self.ask(operation)
        assert isinstance(leased, Leased), leased
        ready = list(leased.ready)
        while len(ready) < leased.num_blocks:
            leased = await self.ask(Await(self.worker_id, self.epoch, operation.lease_id, len(ready)))
            assert isinstance(leased, Leased), leased
            ready += leased.ready
        return operation.lease_id, Leased(leased.num_blocks, tuple(ready[: leased.num_blocks]), leased.tiers)

    async def release(
        self, *lease_ids: int, corrupt: Sequence[SequenceHash] = (), num_read: int = 0, read_s: float = 0.0
    ) -> Result:
        return await self.ask(Release(self.worker_id, self.epoch, lease_ids, tuple(corrupt), num_read, read_s))

    def read(self, leased: Leased) -> list[bytes]:
        """READ what is ready from the manager's pool, over the transport."""
        assert self.joined is not None
        if not leased.ready:
            return []
        pool = self.joined.pool
        region = Region(pool.base_address, pool.num_blocks, pool.block_bytes, pool.device, pool.stride_bytes)
        peer = self._agent.connect(pool.agent_metadata, region)
        targets = [BlockId(len(self.pool) - 1 - index) for index in range(len(leased.ready))]
        transfer = self._agent.start_read(peer, [BlockId(ref.slot) for ref in leased.ready], targets)
        assert transfer.poll() is TransferState.DONE
        self._agent.disconnect(peer)
        return [self.pool[target].tobytes() for target in targets]


def space_of(manager: KvBlockManager) -> Space:
    """What is served."""
    assert manager.space is not None
    return manager.space


async def settled(manager: KvBlockManager) -> None:
    """Wait until nothing is on its way between the tiers."""
    space = space_of(manager)
    if space.disk_writes is not None:
        writes = space.disk_writes
        await until(lambda: writes.is_idle and not writes.num_waiting, "writes to disk")
    if space.object_writes is not None:
        puts = space.object_writes
        later = space._store.catching_up
        is_still = lambda: puts.is_idle and not puts.num_waiting and not later.is_busy  # noqa: E731
        await until(is_still, "writes to the store")
