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
