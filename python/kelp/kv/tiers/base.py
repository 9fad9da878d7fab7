"""What the block manager needs of its tiers: bytes of blocks, kept by name.

A tier keeps bytes and the records that say what they are; which blocks stay, who may read them and what they are worth
is the manager's business (`kv.manager`). Slots are indices of equal places. The host arena is the only tier that is
ever read by peers: everything from below is promoted into it first.

All calls may block on I/O and belong to threads of the manager, one caller at a time per tier. A call that fails for
some blocks says for which; it never raises for content that is damaged or missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kelp.core.types import SequenceHash
from kelp.transport.base import Region

STORE_STATES = ("closed", "open", "half-open", "starting")
"""All is well; left alone; to be tried; without its process."""


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """What is known of a block's content, wherever it lies.

    Attributes:
        parent: None for the first block of a sequence.
        tenant: 16 bytes: `core.hashing.tenant_digest` of the cache salt.
        checksum: 8 bytes: `kv.tiers.records.checksum` of the plain bytes, with the name, so that a block under
            another's name is as wrong as a damaged one.
    """

    sequence_hash: SequenceHash
    parent: SequenceHash | None
    position: int
    tenant: bytes
    checksum: bytes


class HostArena(Protocol):
    """Tier G2: memory that survives the manager's process where the system has tmpfs."""

    @property
    def region(self) -> Region:
        """For registration with a transport; never unmapped before `close`."""

    @property
    def owner(self) -> object:
        """Keeps the mapping alive."""

    @property
    def num_slots(self) -> int:
        """Places for blocks."""

    def checksum(self, slot: int, name: SequenceHash) -> bytes:
        """Checksum of what lies in a slot, if it is the block `name`."""

    def commit(self, slot: int, record: BlockRecord) -> None:
        """The slot's content is this block, also after a crash. The record counts from the moment it is complete."""

    def clear(self, slots: Iterable[int], is_wiped: bool = False) -> None:
        """The slots mean nothing any more, also after a crash; `is_wiped` overwrites the bytes too."""

    def recovered(self) -> Iterator[tuple[int, BlockRecord]]:
        """What an earlier process left in place, once, at the start; content is unverified."""

    def close(self, is_kept: bool) -> None:
        """Unmap; without `is_kept` the memory is given back to the system."""


class DiskTier(Protocol):
    """Tier G3: slots of preallocated files, by way of arena slots."""

    @property
    def num_slots(self) -> int:
        """Places for blocks."""

    @property
    def events(self) -> Mapping[str, int]:
        """What happened so far, by kind, for metrics: only ever grows."""

    @property
    def stuck_slots(self) -> frozenset[int]:
        """Arena slots of a `read` or `write` that a hanging disk has not let go of: to be asked after one has failed.

        The disk may still write to them, however late, so nothing may be put there while they are named here.
        """

    def write(self, moves: Sequence[tuple[int, int, BlockRecord]]) -> list[bool]:
        """Write blocks from arena slots into disk slots: `(arena_slot, disk_slot, record)`; says which are durable.

        Durable means: after any crash of any process, and after power loss once the kernel has written it, the slot
        either gives exactly these bytes or is found damaged.
        """

    def read(self, moves: Sequence[tuple[int, int, BlockRecord]]) -> list[bool]:
        """Read blocks from disk slots into arena slots: `(disk_slot, arena_slot, record)`; says which are right.

        Right means: the checksum of the plain bytes is the record's.
        """

    def clear(self, slots: Iterable[int], is_wiped: bool = False) -> None:
        """The slots mean nothing any more; `is_wiped` gives the bytes back to the file system too."""

    @property
    def owes_wipes(self) -> bool:
        """Whether bytes of slots that were to be wiped still lie there; every `read`, `write` and wipe tries again."""

    def recovered(self) -> Iterator[tuple[int, BlockRecord]]:
        """What earlier processes left, once, at the start, with progress in the log; content is verified at `read`."""

    def close(self) -> None:
        """Stop; everything stays on disk."""


class ObjectTier(Protocol):
    """Tier G4: groups of consecutive blocks in objects of a shared store, named by content."""

    @property
    def is_available(self) -> bool:
        """False while the store has failed too often and is left alone."""

    @property
    def state(self) -> str:
        """One of `STORE_STATES`."""

    @property
    def events(self) -> Mapping[str, int]:
        """What happened so far, by kind, for metrics: only ever grows. `damaged` are blocks."""

    @property
    def stored_bytes(self) -> int:
        """What the last listing found below the prefix, of all hosts and models."""

    @property
    def full_tenants(self) -> frozenset[bytes]:
        """Whose share had no room at the last listing: what was missed is not offered again for them."""

    @property
    def group_blocks(self) -> int:
        """Blocks per object; group *i* of a sequence is its blocks `[i * group_blocks, (i + 1) * group_blocks)`."""

    def put(self, arena_slots: Sequence[int], records: Sequence[BlockRecord]) -> bool:
        """Write one whole group; True once the store has it (or had it)."""

    def put_groups(self, groups: Sequence[tuple[Sequence[int], Sequence[BlockRecord]]]) -> list[bool]:
        """Write several groups, some of them at once; each as in `put`."""

    def find(self, hashes: Sequence[SequenceHash], first_position: int, tenant: bytes) -> int:
        """How many leading blocks of `hashes` the store is known to have. Asks the store at most once, briefly."""

    def get(
        self, moves: Sequence[tuple[SequenceHash, int]], first_position: int, tenant: bytes
    ) -> list[BlockRecord | None]:
        """Read consecutive blocks into arena slots: `(hash, arena_slot)`; a record for each that is right."""

    def quarantined(self) -> frozenset[int]:
        """Arena slots that a request which failed could still write into: nothing may be put there meanwhile.

        Empty but for the moments in which a killed process is not yet known to be dead.
        """

    def forget(self, tenant: bytes | None) -> int:
        """Delete all objects of a tenant (None: of all), whoever wrote them; returns how many there were.

        Raises:
            RetryableTransferError: The store could not be reached; `refresh` goes on with it.
        """

    @property
    def owed(self) -> frozenset[bytes | None]:
        """Arguments of `forget` that `refresh` has to go on with."""

    def refresh(self) -> Iterable[tuple[SequenceHash, ...]]:
        """Learn what other hosts wrote or deleted and keep the quota; gives the groups' last hashes known now."""

    def close(self) -> None:
        """Stop; what is being written may be lost, nothing is left half-written."""
