"""NIXL over UCX: the transport between processes and hosts.

What UCX's backend needs handling for is handled here (docs/architecture.md, "Transport"):

- Agents are not thread-safe: one lock owns ours, and NIXL's own strict mode covers its destructors.
- A same-host READ runs inside the post, so callers use worker threads (see `base`).
- A peer's name is unique per incarnation, so a restarted peer never meets its predecessor's metadata.
- The first READ from a peer pays for wiring up; `connect` does it, into a scratch block.
- Descriptors are one per block, prepared once per pool; NIXL's pickled descriptors are never used.
- A handle that fails may still have parts in flight; only removing the peer stops them (`disconnect`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kelp.core.errors import ConfigError, FatalTransferError, ProtocolError, RetryableTransferError
from kelp.core.types import BlockId
from kelp.transport.base import Peer, Region, TransferState
from kelp.transport.layout import check_read, check_regions, descriptor_rows, device_number
from kelp.transport.metadata import pack_metadata, unpack_metadata
from kelp.transport.nixl.library import error_types, import_nixl, memory_type, sleeping_progress_thread, typed_error

_log = logging.getLogger(__name__)

_WARM_UP_TIMEOUT_S, _WARM_UP_POLL_S = 10.0, 0.0005


def _scratch_block(region: Region) -> tuple[Region, object]:
    """Memory beside the pool, of the pool's kind, that a warm-up READ may overwrite; and its owner."""
    if region.device == "cpu":
        block = np.zeros(region.block_bytes, dtype=np.uint8)
        return Region(block.ctypes.data, 1, region.block_bytes, region.device), block
    import torch

    tensor = torch.zeros(region.block_bytes, dtype=torch.uint8, device=region.device)
    return Region(tensor.data_ptr(), 1, region.block_bytes, region.device), tensor


@dataclass(eq=False)
class NixlPeer:
    """A remote pool whose descriptors are prepared."""

    agent_name: str
    region: Region
    blocks: Any
    handles: list[Any] = field(default_factory=list)
    is_connected: bool = True


class NixlTransfer:
    """One posted READ."""

    def __init__(self, agent: NixlAgent, peer: NixlPeer, handle: Any) -> None:
        self._agent = agent
        self._peer = peer
        self._handle = handle

    def poll(self) -> TransferState:
        """See `base.Transfer`."""
        return self._agent.poll(self._peer, self._handle)

    def release(self) -> None:
        """See `base.Transfer`."""
        self._agent.release(self._peer, self._handle)


class NixlAgent:
    """See `base.Agent`. Making one takes about half a second.

    Raises:
        ConfigError: The wheel is missing or the UCX backend does not start.
    """

    def __init__(self, name: str) -> None:
        api = import_nixl()
        self.name = f"{name}:{uuid.uuid4().hex}"
        self._errors = error_types(api)
        self._load_errors: tuple[type[Exception], ...] = (*self._errors, RuntimeError, ValueError)
        self._lock = threading.RLock()
        self._peers: dict[str, NixlPeer] = {}
        self._region: Region | None = None
        self._kept_alive: list[object] = []
        self._registered: list[Any] = []
        self._is_closed = False
        strict = api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        config = api.nixl_agent_config(enable_prog_thread=True, backends=["UCX"], sync_mode=strict)
        try:
            with sleeping_progress_thread(api):
                self._agent = api.nixl_agent(self.name, config)
        except self._load_errors as error:
            raise ConfigError(f"handoff.transport: nixl: the UCX backend does not start: {error}") from error
        if "UCX" not in self._agent.backends:
            raise ConfigError("handoff.transport: nixl: the wheel has no UCX backend")

    def register(self, region: Region, owner: object) -> None:
        """See `base.Agent`."""
        assert self._region is None, "a region is registered once per agent"
        with self._guard("register"):
            self._local_blocks = self._add_memory(region, owner)
            self._scratch_block = self._add_memory(*_scratch_block(region))
        self._region = region

    def _add_memory(self, region: Region, owner: object) -> Any:
        rows = [(region.base_address, region.span_bytes, device_number(region), "")]
        self._kept_alive.append(owner)
        self._registered.append(self._agent.register_memory(rows, memory_type(region.device)))
        return self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", descriptor_rows(region), memory_type(region.device))

    def metadata(self) -> bytes:
        """See `base.Agent`."""
        with self._guard("metadata"):
            return pack_metadata("nixl", self.name, bytes(self._agent.get_agent_metadata()))

    def connect(self, metadata: bytes, region: Region) -> NixlPeer:
        """See `base.Agent`. Blocks until the first block of the peer has been read into scratch memory."""
        check_regions(self._region, region)
        peer = self._add_peer(metadata, region)
        try:
            self._warm_up(peer)
        except BaseException:
            self.disconnect(peer)
            raise
        return peer

    def _add_peer(self, metadata: bytes, region: Region) -> NixlPeer:
        agent_name, connection = unpack_metadata("nixl", metadata)
        with self._guard("connect"):
            if agent_name in (self.name, *self._peers):
                raise ProtocolError(f"connect: agent {agent_name} is this one or connected already")
            try:
                if self._agent.add_remote_agent(connection) != agent_name.encode():
                    raise ValueError("the metadata is of another agent than it says")
                blocks = self._agent.prep_xfer_dlist(agent_name, descriptor_rows(region), memory_type(region.device))
            except self._load_errors as error:
                self._quietly(self._agent.remove_remote_agent, agent_name)
                raise typed_error(error, "connect") from error
            peer = self._peers[agent_name] = NixlPeer(agent_name, region, blocks)
            return peer

    def _warm_up(self, peer: NixlPeer) -> None:
        with self._guard("connect"):
            self._agent.make_connection(peer.agent_name)
        transfer = self._post(peer, [BlockId(0)], self._scratch_block, [BlockId(0)])
        deadline_s = time.monotonic() + _WARM_UP_TIMEOUT_S
        while transfer.poll() is TransferState.RUNNING:
            if time.monotonic() > deadline_s:
                raise FatalTransferError(f"connect: {peer.agent_name} is silent for {_WARM_UP_TIMEOUT_S} s")
            time.sleep(_WARM_UP_POLL_S)
        transfer.release()

    def disconnect(self, peer: Peer) -> None:
        """See `base.Agent`."""
        assert isinstance(peer, NixlPeer)
        with self._lock:
            if not peer.is_connected:
                return
            peer.is_connected = False
            self._peers.pop(peer.agent_name, None)
            for handle in peer.handles:
                self._quietly(handle.release)
            self._quietly(peer.blocks.release)
            self._quietly(self._agent.remove_remote_agent, peer.agent_name)
            for handle in peer.handles:
                self._quietly(handle.release)
            peer.handles.clear()

    def start_read(self, peer: Peer, remote_ids: Sequence[BlockId], local_ids: Sequence[BlockId]) -> NixlTransfer:
        """See `base.Agent`."""
        assert isinstance(peer, NixlPeer)
        check_read(self._region, peer.region, remote_ids, local_ids)
        return self._post(peer, remote_ids, self._local_blocks, local_ids)

    def _post(
        self, peer: NixlPeer, remote_ids: Sequence[BlockId], local_blocks: Any, local_ids: Sequence[BlockId]
    ) -> NixlTransfer:
        with self._guard("read", peer):
            local_rows, remote_rows = np.asarray(local_ids, np.int32), np.asarray(remote_ids, np.int32)
            handle = self._agent.make_prepped_xfer("READ", local_blocks, local_rows, peer.blocks, remote_rows)
            peer.handles.append(handle)
            transfer = NixlTransfer(self, peer, handle)
            try:
                state = self._agent.transfer(handle)
            except self._errors:
                transfer.release()
                raise
        if state == "ERR":
            transfer.release()
            raise RetryableTransferError(f"read: {peer.agent_name} refused the transfer")
        return transfer

    def poll(self, peer: NixlPeer, handle: Any) -> TransferState:
        """State of a transfer of this agent; for `NixlTransfer`."""
        with self._guard("read", peer):
            state = self._agent.check_xfer_state(handle)
        if state == "ERR":
            raise RetryableTransferError(f"read: the transfer from {peer.agent_name} failed")
        return TransferState.DONE if state == "DONE" else TransferState.RUNNING

    def release(self, peer: NixlPeer, handle: Any) -> None:
        """Free a transfer of this agent; one that cannot be cancelled is kept until `disconnect`."""
        with self._lock:
            if handle in peer.handles and self._quietly(handle.release):
                peer.handles.remove(handle)

    def close(self) -> None:
        """See `base.Agent`."""
        with self._lock:
            if self._is_closed:
                return
            for peer in list(self._peers.values()):
                self.disconnect(peer)
            if self._region is not None:
                self._quietly(self._local_blocks.release)
                self._quietly(self._scratch_block.release)
            for registered in self._registered:
                self._quietly(self._agent.deregister_memory, registered)
            self._is_closed = True
            self._registered.clear()
            self._kept_alive.clear()
            del self._agent

    @contextlib.contextmanager
    def _guard(self, what: str, peer: NixlPeer | None = None) -> Iterator[None]:
        with self._lock:
            if self._is_closed:
                raise FatalTransferError(f"{what}: this agent is closed")
            if peer is not None and not peer.is_connected:
                raise FatalTransferError(f"{what}: agent {peer.agent_name} was disconnected")
            try:
                yield
            except self._errors as error:
                raise typed_error(error, what) from error

    def _quietly(self, release: Any, *arguments: Any) -> bool:
        try:
            release(*arguments)
        except self._errors as error:
            _log.debug("nixl: release: %s", error)
            return False
        return True
