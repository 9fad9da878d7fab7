"""Tiers in memory: they do what `kv.tiers.base` says, survive a manager that dies, and fail when told to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from kelp.core.errors import RetryableTransferError
from kelp.core.types import SequenceHash
from kelp.kv.tiers.base import BlockRecord
from kelp.transport.base import Region


def fake_checksum(content: bytes, name: SequenceHash) -> bytes:
    return hashlib.blake2b(name + content, digest_size=8).digest()


@dataclass
class ArenaMemory:
    """What outlives a manager."""

    pool: np.ndarray
    records: dict[int, BlockRecord] = field(default_factory=dict)

    @classmethod
    def new(cls, num_slots: int, block_bytes: int) -> ArenaMemory:
        return cls(np.zeros((num_slots, block_bytes), dtype=np.uint8))


class FakeArena:
    """`HostArena` over `ArenaMemory`."""

    def __init__(self, memory: ArenaMemory) -> None:
        self.memory = memory
        self.owner = memory.pool
        self.closed_kept: bool | None = None
        num_slots, block_bytes = memory.pool.shape
        self.region = Region(memory.pool.ctypes.data, num_slots, block_bytes, "cpu")
        self.num_slots = num_slots

    def content(self, slot: int) -> bytes:
        return self.memory.pool[slot].tobytes()

    def checksum(self, slot: int, name: SequenceHash) -> bytes:
        return fake_checksum(self.content(slot), name)

    def commit(self, slot: int, record: BlockRecord) -> None:
        self.memory.records[slot] = record

    def clear(self, slots: Iterable[int], is_wiped: bool = False) -> None:
        for slot in slots:
            self.memory.records.pop(slot, None)
            if is_wiped:
                self.memory.pool[slot] = 0

    def recovered(self) -> Iterator[tuple[int, BlockRecord]]:
        yield from list(self.memory.records.items())

    def close(self, is_kept: bool) -> None:
        self.closed_kept = is_kept
        if not is_kept:
            self.memory.records.clear()


@dataclass
class DiskMemory:
    """What outlives a manager and the arena."""

    num_slots: int
    slots: dict[int, tuple[bytes, BlockRecord]] = field(default_factory=dict)
    num_failing_writes: int = 0


class FakeDisk:
    """`DiskTier` over `DiskMemory`, by way of an arena."""

    def __init__(self, memory: DiskMemory, arena: FakeArena) -> None:
        self.memory = memory
        self._arena = arena
        self.num_slots = memory.num_slots
        self.num_writes = 0
        self.stuck: set[int] = set()
        self.owes_wipes = False
        self.events = {"corrupt": 0}

    @property
    def stuck_slots(self) -> frozenset[int]:
        return frozenset(self.stuck)

    def write(self, moves: Sequence[tuple[int, int, BlockRecord]]) -> list[bool]:
        if self.memory.num_failing_writes:
            self.memory.num_failing_writes -= 1
            return [False] * len(moves)
        for source, target, record in moves:
            self.memory.slots[target] = (self._arena.content(source), record)
            self.num_writes += 1
        return [True] * len(moves)

    def read(self, moves: Sequence[tuple[int, int, BlockRecord]]) -> list[bool]:
        results = []
        for source, target, record in moves:
            content, _ = self.memory.slots.get(source, (b"", record))
            is_right = fake_checksum(content, record.sequence_hash) == record.checksum
            self.events["corrupt"] += not is_right
            if is_right:
                self._arena.memory.pool[target] = np.frombuffer(content, dtype=np.uint8)
            results.append(is_right)
        return results

    def damage(self, name: SequenceHash) -> None:
        for slot, (content, record) in self.memory.slots.items():
            if record.sequence_hash == name:
                self.memory.slots[slot] = (content[:-1] + bytes([content[-1] ^ 1]), record)

    def clear(self, slots: Iterable[int], is_wiped: bool = False) -> None:
        for slot in slots:
            self.memory.slots.pop(slot, None)

    def recovered(self) -> Iterator[tuple[int, BlockRecord]]:
        yield from [(slot, record) for slot, (_, record) in self.memory.slots.items()]

    def close(self) -> None:
        return


@dataclass
class StoreMemory:
    """An object store: shared between hosts."""

    group_blocks: int = 2
    blocks: dict[tuple[bytes, SequenceHash], tuple[bytes, BlockRecord]] = field(default_factory=dict)
    is_available: bool = True
    num_failing_puts: int = 0


class FakeObjects:
    """`ObjectTier` over `StoreMemory`."""

    def __init__(self, memory: StoreMemory, arena: FakeArena) -> None:
        self.memory = memory
        self._arena = arena
        self.num_finds = 0
        self.num_refreshes = 0
        self.stuck: set[int] = set()
        self.events = {"damaged": 0, "missing": 0}
        self.stored_bytes = 0
        self.full_tenants: frozenset[bytes] = frozenset()
        self.owed: frozenset[bytes | None] = frozenset()

    @property
    def is_available(self) -> bool:
        return self.memory.is_available

    @property
    def state(self) -> str:
        return "closed" if self.memory.is_available else "open"

    @property
    def group_blocks(self) -> int:
        return self.memory.group_blocks

    def put(self, arena_slots: Sequence[int], records: Sequence[BlockRecord]) -> bool:
        if not self.is_available:
            return False
        if self.memory.num_failing_puts:
            self.memory.num_failing_puts -= 1
            return False
        assert len(records) == self.group_blocks and records[0].position % self.group_blocks == 0
        for slot, record in zip(arena_slots, records, strict=True):
            self.memory.blocks[record.tenant, record.sequence_hash] = (self._arena.content(slot), record)
        return True

    def put_groups(self, groups: Sequence[tuple[Sequence[int], Sequence[BlockRecord]]]) -> list[bool]:
        return [self.put(slots, records) for slots, records in groups]

    def quarantined(self) -> frozenset[int]:
        return frozenset(self.stuck)

    def find(self, hashes: Sequence[SequenceHash], first_position: int, tenant: bytes) -> int:
        self.num_finds += 1
        count = 0
        while count < len(hashes) and (tenant, hashes[count]) in self.memory.blocks:
            count += 1
        return count

    def get(
        self, moves: Sequence[tuple[SequenceHash, int]], first_position: int, tenant: bytes
    ) -> list[BlockRecord | None]:
        found: list[BlockRecord | None] = []
        for name, slot in moves:
            content, record = self.memory.blocks.get((tenant, name), (b"", None))
            if record is not None and fake_checksum(content, name) == record.checksum:
                self._arena.memory.pool[slot] = np.frombuffer(content, dtype=np.uint8)
                found.append(record)
            else:
                self.events["missing" if record is None else "damaged"] += 1
                found.append(None)
        return found

    def damage(self, name: SequenceHash) -> None:
        for key, (content, record) in self.memory.blocks.items():
            if record.sequence_hash == name:
                self.memory.blocks[key] = (content[:-1] + bytes([content[-1] ^ 1]), record)

    def forget(self, tenant: bytes | None) -> int:
        self.owed |= {tenant}
        self._check_available()
        self.owed -= {tenant}
        gone = [key for key in self.memory.blocks if tenant in (None, key[0])]
        for key in gone:
            del self.memory.blocks[key]
        return len(gone)

    def refresh(self) -> Iterable[tuple[SequenceHash, ...]]:
        self._check_available()
        self.num_refreshes += 1
        for tenant in self.owed:
            self.forget(tenant)
        return [(name,) for _, name in self.memory.blocks]

    def close(self) -> None:
        return

    def _check_available(self) -> None:
        if not self.is_available:
            raise RetryableTransferError("object store: left alone (open)")
