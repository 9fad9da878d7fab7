"""Transport within one process, by memmove; for tests and for trying things out.

Behaves like NIXL where that matters: agents find each other through metadata only, a READ names blocks, nothing
protects a peer's memory, and a READ that stalls can still write long after everybody forgot about it, until its
peer is disconnected. `ReadFaults` injects exactly these troubles.
"""

from __future__ import annotations

import ctypes
import threading
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from kelp.core.errors import FatalTransferError, ProtocolError, TransferError
from kelp.core.types import BlockId
from kelp.transport.base import Peer, Region, TransferState
from kelp.transport.layout import check_read, check_regions
from kelp.transport.metadata import pack_metadata, unpack_metadata

_agents: weakref.WeakValueDictionary[str, LocalAgent] = weakref.WeakValueDictionary()
_agents_lock = threading.Lock()


class StalledRead:
    """A READ that stays in flight until the test lets it go on."""

    def __init__(self) -> None:
        self.is_posted = threading.Event()
        self._resumed = threading.Event()
        self._transfer: LocalTransfer | None = None

    def resume(self) -> None:
        """Let the bytes land now, even if the reader has given up; not if the peer was disconnected."""
        self._resumed.set()
        if self._transfer is not None:
            self._transfer.land()

    def attach(self, transfer: LocalTransfer) -> None:
        """Called when the READ is posted."""
        self._transfer = transfer
        self.is_posted.set()
        if self._resumed.is_set():
            transfer.land()


class ReadFaults:
    """What goes wrong with which READ of an agent; READs count from 0 in the order of `start_read`."""

    def __init__(self) -> None:
        self._errors: dict[int, TransferError] = {}
        self._stalls: dict[int, StalledRead] = {}
        self._num_reads = 0
        self._lock = threading.Lock()

    @property
    def num_reads(self) -> int:
        """READs posted so far."""
        return self._num_reads

    def fail(self, number: int, error: TransferError) -> None:
        """READ `number` moves nothing and `poll` raises `error`."""
        self._errors[number] = error

    def stall(self, number: int) -> StalledRead:
        """READ `number` stays in flight until `StalledRead.resume`."""
        return self._stalls.setdefault(number, StalledRead())

    def next_read(self) -> tuple[TransferError | None, StalledRead | None]:
        """What the READ posted now shall suffer; called by the agent."""
        with self._lock:
            number = self._num_reads
            self._num_reads += 1
        return self._errors.get(number), self._stalls.get(number)


@dataclass(eq=False)
class LocalPeer:
    """A connected agent of this process."""

    agent_name: str
    region: Region
    is_connected: bool = True


class LocalTransfer:
    """One READ; the copy happens when it lands."""

    def __init__(self, peer: LocalPeer, copies: list[tuple[int, int]], error: TransferError | None) -> None:
        self._peer = peer
        self._copies = copies
        self._error = error
        self._is_done = False
        self._lock = threading.Lock()

    def land(self) -> None:
        """Copy all blocks, unless the peer has been disconnected."""
        with self._lock:
            if self._is_done or self._error is not None or not self._peer.is_connected:
                return
            for target, source in self._copies:
                ctypes.memmove(target, source, self._peer.region.block_bytes)
            self._is_done = True

    def poll(self) -> TransferState:
        """See `base.Transfer`."""
        if self._error is not None:
            raise self._error
        with self._lock:
            if self._is_done:
                return TransferState.DONE
        _live_region(self._peer)
        return TransferState.RUNNING

    def release(self) -> None:
        """See `base.Transfer`."""

    def stop(self) -> None:
        """Wait until no copy runs; none starts afterwards once the peer is disconnected."""
        with self._lock:
            return


class LocalAgent:
    """See `base.Agent`."""

    def __init__(self, name: str, faults: ReadFaults | None = None) -> None:
        self._name = f"{name}:{uuid.uuid4().hex}"
        self._faults = faults or ReadFaults()
        self._region: Region | None = None
        self._owner: object = None
        self._transfers: weakref.WeakSet[LocalTransfer] = weakref.WeakSet()
        with _agents_lock:
            _agents[self._name] = self

    @property
    def name(self) -> str:
        """See `base.Agent`."""
        return self._name

    @property
    def region(self) -> Region | None:
        """What peers may read."""
        return self._region

    def register(self, region: Region, owner: object) -> None:
        """See `base.Agent`."""
        assert self._region is None, "a region is registered once per agent"
        self._region, self._owner = region, owner

    def metadata(self) -> bytes:
        """See `base.Agent`."""
        return pack_metadata("local", self._name, b"")

    def connect(self, metadata: bytes, region: Region) -> LocalPeer:
        """See `base.Agent`."""
        check_regions(self._region, region)
        peer = LocalPeer(unpack_metadata("local", metadata)[0], region)
        actual = _live_region(peer)
        if actual is None or not _contains(actual, region):
            raise ProtocolError(f"connect: the region is not registered by {peer.agent_name}")
        return peer

    def disconnect(self, peer: Peer) -> None:
        """See `base.Agent`."""
        assert isinstance(peer, LocalPeer)
        peer.is_connected = False
        for transfer in list(self._transfers):
            transfer.stop()

    def start_read(self, peer: Peer, remote_ids: Sequence[BlockId], local_ids: Sequence[BlockId]) -> LocalTransfer:
        """See `base.Agent`."""
        assert isinstance(peer, LocalPeer)
        check_read(self._region, peer.region, remote_ids, local_ids)
        assert self._region is not None
        _live_region(peer)
        error, stall = self._faults.next_read()
        copies = [
            (_address(self._region, local_id), _address(peer.region, remote_id))
            for remote_id, local_id in zip(remote_ids, local_ids, strict=True)
        ]
        transfer = LocalTransfer(peer, copies, error)
        self._transfers.add(transfer)
        if stall is None:
            transfer.land()
        else:
            stall.attach(transfer)
        return transfer

    def close(self) -> None:
        """See `base.Agent`."""
        with _agents_lock:
            _agents.pop(self._name, None)
        self._region, self._owner = None, None


def _address(region: Region, block_id: BlockId) -> int:
    return region.base_address + block_id * region.stride


def _contains(outer: Region, inner: Region) -> bool:
    begin = outer.base_address <= inner.base_address
    end = inner.base_address + inner.span_bytes <= outer.base_address + outer.span_bytes
    return begin and end and outer.device == inner.device


def _live_region(peer: LocalPeer) -> Region | None:
    with _agents_lock:
        agent = _agents.get(peer.agent_name)
    if agent is None:
        raise FatalTransferError(f"agent {peer.agent_name} is gone")
    if not peer.is_connected:
        raise FatalTransferError(f"agent {peer.agent_name} was disconnected")
    return agent.region
