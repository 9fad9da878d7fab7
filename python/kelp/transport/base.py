"""What kelp needs of a one-sided transport.

An agent owns registered regions of its process and READs from peers whose metadata it was given. It never
interprets what it moves. All methods may block for the length of a small copy (a same-host READ happens inside
`start_read`): call them from a worker thread, never from an event loop. Implementations are thread-safe.

A READ has no memory safety of its own: the peer may have freed or reused the memory while it ran (facts: NIXL,
"TRAP 3"). Only the lease protocol of `kv.handoff` makes the bytes trustworthy.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kelp.core.types import BlockId


@dataclass(frozen=True, slots=True)
class Region:
    """A pool of equal blocks: block *b* is `block_bytes` bytes at `base_address + b * stride`.

    Attributes:
        stride_bytes: From one block to the next; 0 if they lie side by side.
    """

    base_address: int
    num_blocks: int
    block_bytes: int
    device: str
    stride_bytes: int = 0

    @property
    def stride(self) -> int:
        """Bytes from one block to the next."""
        return self.stride_bytes or self.block_bytes

    @property
    def span_bytes(self) -> int:
        """Bytes from the start of the first block to the end of the last."""
        return (self.num_blocks - 1) * self.stride + self.block_bytes


class TransferState(enum.Enum):
    """What `Transfer.poll` reports."""

    RUNNING = "running"
    DONE = "done"


class Transfer(Protocol):
    """One READ in flight."""

    def poll(self) -> TransferState:
        """Progress.

        Raises:
            RetryableTransferError: It failed, and may be posted again.
            FatalTransferError: The peer is gone.
        """

    def release(self) -> None:
        """Forget the transfer; idempotent. Memory of one still running stays written to: quarantine it."""


class Peer(Protocol):
    """A remote agent's pool, as this agent addresses it."""

    @property
    def region(self) -> Region:
        """The remote pool."""


class Agent(Protocol):
    """One endpoint of the transport."""

    @property
    def name(self) -> str:
        """Unique per incarnation of a process."""

    def register(self, region: Region, owner: object) -> None:
        """Make the local pool readable by peers and writable by READs of this agent; once per agent.

        `owner` is kept alive until `close`.
        """

    def metadata(self) -> bytes:
        """What a peer needs to connect; valid after `register`."""

    def connect(self, metadata: bytes, region: Region) -> Peer:
        """Add a peer.

        Raises:
            ProtocolError: The metadata is garbage or of another agent version, nothing is registered here, or
                `region` is not what the peer registered.
            TransferError: The peer cannot be reached.
        """

    def disconnect(self, peer: Peer) -> None:
        """Forget a peer; idempotent. Afterwards no READ from it, abandoned ones included, writes any more."""

    def start_read(self, peer: Peer, remote_ids: Sequence[BlockId], local_ids: Sequence[BlockId]) -> Transfer:
        """READ remote blocks into local ones, pairwise.

        Raises:
            ProtocolError: An id is outside its pool, or the lists differ in length.
            FatalTransferError: The peer is gone.
        """

    def close(self) -> None:
        """Deregister everything; idempotent. Registered memory may be freed afterwards."""


@dataclass(frozen=True, slots=True)
class SlotFile:
    """An open file of equal slots: slot *s* is `slot_bytes` bytes at `s * slot_bytes`.

    Attributes:
        fd: With O_DIRECT, memory and slots are multiples of 4096 bytes.
    """

    fd: int
    num_slots: int
    slot_bytes: int


class MoveOutcome(enum.Enum):
    """What became of one slot of a `FileTransfer`; all but `MOVED` leave undefined bytes where it went."""

    MOVED = "moved"
    NO_SPACE = "no space"
    SHORT = "short"
    FAILED = "failed"
    LATE = "late"
    """Not known: memory and slot of the file are in `FileTransport.stuck` until it has ended."""


class FileTransfer(Protocol):
    """Some slots on their way between memory and a file."""

    def wait(self, timeout_s: float) -> list[MoveOutcome]:
        """Outcomes in the order of the moves, once; after `timeout_s` the transfer is abandoned."""


@dataclass(frozen=True, slots=True)
class StuckSlots:
    """What abandoned transfers may still read or write: nobody else may use it, and its memory stays mapped.

    Attributes:
        memory: `(region, slot)`.
        files: `(fd, slot)`.
    """

    memory: frozenset[tuple[Region, int]]
    files: frozenset[tuple[int, int]]


class FileTransport(Protocol):
    """Moves slots between registered memory of this process and files of this machine; for one thread at a time."""

    @property
    def name(self) -> str:
        """How it is done, for people."""

    def register(self, region: Region, owner: object) -> None:
        """Make memory usable; `owner` is kept alive until `close`, and for ever if a transfer is stuck."""

    def attach(self, file: SlotFile) -> None:
        """Make a file usable; its descriptor stays open until `close`."""

    def start_read(self, file: SlotFile, region: Region, moves: Sequence[tuple[int, int]]) -> FileTransfer:
        """Read into memory: `(slot of the region, slot of the file)`; both have slots of `slot_bytes`.

        Never raises for what the file system does: `FileTransfer.wait` says so of each slot.
        """

    def start_write(self, file: SlotFile, region: Region, moves: Sequence[tuple[int, int]]) -> FileTransfer:
        """Write from memory: see `start_read`. Says nothing of durability: that takes an fdatasync."""

    def stuck(self) -> StuckSlots:
        """What abandoned transfers that have not ended yet may still touch."""

    def close(self) -> bool:
        """Give everything back; idempotent.

        Returns:
            False if a transfer is still stuck: its memory and descriptor are then leaked on purpose.
        """
