"""A prefill worker of the test's own: real gRPC, real NIXL, and it says whatever it was told to say.

It answers `Describe` with any bytes, and to a reader that attaches it sends a script, then only renews the lease.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import numpy as np

from kelp.core.handoff_messages import HANDOFF_COMMAND, Acknowledge, Heartbeat, LeaseRenewed, PeerDescription
from kelp.core.messages import Rendezvous
from kelp.core.peer_auth import PeerToken, seal, unseal
from kelp.core.types import KVLayout
from kelp.core.wire import Message, decode_message, encode_message
from kelp.kv.handoff.wire import ATTACH, DESCRIBE, DESCRIBE_PROOF, DESCRIPTION_PROOF, SERVICE, proof_scope
from kelp.registry.base import LayoutRecord
from kelp.transport.layout import describe_pool, pool_region
from kelp.transport.nixl import NixlAgent

EPOCH = "epoch of the peer"
HANDOFF_ID = "handoff of the peer"
LEASE_TTL_S = 5.0
_NUM_BLOCKS = 4


class PeerPool:
    """A small KV pool that other processes can read; blocks are all zero."""

    def __init__(self, layout: LayoutRecord) -> None:
        fields = {**layout.model_dump(), "num_blocks": _NUM_BLOCKS}
        self.layout = KVLayout(**fields)
        self._memory = np.zeros((_NUM_BLOCKS, self.layout.block_bytes), dtype=np.uint8)
        self.agent = NixlAgent("peer")
        self._region = pool_region(self.layout, self._memory.ctypes.data, "cpu")
        self.agent.register(self._region, self._memory)

    def describe(self, **lies: Any) -> PeerDescription:
        """What readers are told; `lies` are not checked."""
        return describe_pool(self.agent, self.layout, self._region, "peer", EPOCH).model_copy(update=lies)

    def close(self) -> None:
        self.agent.close()


class PrefillPeer:
    """See the module docstring."""

    def __init__(self, description: bytes, script: Sequence[Message | bytes], token: PeerToken | None) -> None:
        self._description = description
        self._token = token
        self._script = [item if isinstance(item, bytes) else encode_message(item) for item in script]
        self.has_attached = asyncio.Event()
        self.has_gone = asyncio.Event()
        self.is_acknowledged = False
        self.endpoint = ""

    @property
    def rendezvous(self) -> Rendezvous:
        return Rendezvous(handoff_id=HANDOFF_ID, endpoint=self.endpoint, prefill_epoch=EPOCH)

    async def describe(self, request: bytes, _context: Any) -> bytes:
        scope = proof_scope(self.endpoint, EPOCH)
        nonce = unseal(self._token, DESCRIBE_PROOF, scope, request)
        return seal(self._token, DESCRIPTION_PROOF, scope, self._description, nonce)

    async def attach(self, _requests: Any, context: Any) -> None:
        try:
            await context.read()
            await self._write(context, LeaseRenewed(heartbeat=0, ttl_s=LEASE_TTL_S))
            for item in self._script:
                await context.write(item)
            self.has_attached.set()
            await self._renew(context)
        finally:
            self.has_gone.set()

    async def _renew(self, context: Any) -> None:
        while isinstance(raw := await context.read(), bytes):
            command = decode_message(HANDOFF_COMMAND, raw, "command")
            if isinstance(command, Heartbeat):
                await self._write(context, LeaseRenewed(heartbeat=command.number, ttl_s=LEASE_TTL_S))
            elif isinstance(command, Acknowledge):
                self.is_acknowledged = True
                return

    async def _write(self, context: Any, message: Message) -> None:
        await context.write(encode_message(message))


@contextlib.asynccontextmanager
async def open_prefill_peer(
    description: PeerDescription | bytes, script: Sequence[Message | bytes] = (), token: PeerToken | None = None
) -> AsyncIterator[PrefillPeer]:
    """A peer that listens."""
    peer = PrefillPeer(description if isinstance(description, bytes) else encode_message(description), script, token)
    server = grpc.aio.server()
    methods = {
        DESCRIBE: grpc.unary_unary_rpc_method_handler(peer.describe),
        ATTACH: grpc.stream_stream_rpc_method_handler(peer.attach),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    peer.endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield peer
    finally:
        await server.stop(None)
