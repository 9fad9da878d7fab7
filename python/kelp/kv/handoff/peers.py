"""The prefill workers a decode worker knows: described once, connected once, dropped when anything is wrong.

Knows nothing of single handoffs.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import secrets
from dataclasses import dataclass
from typing import Any

import grpc

from kelp.core.errors import CapacityError, WorkerLost
from kelp.core.handoff_messages import PEER_DESCRIPTION, PeerDescription
from kelp.core.messages import Rendezvous
from kelp.core.peer_auth import PeerToken, seal, unseal
from kelp.core.types import KVLayout
from kelp.core.wire import decode_message
from kelp.kv.handoff.wire import (
    ATTACH_PROOF,
    CHANNEL_OPTIONS,
    DESCRIBE,
    DESCRIBE_PROOF,
    DESCRIPTION_PROOF,
    NONCE_BYTES,
    from_rpc_error,
    proof_scope,
    rpc_path,
)
from kelp.transport.base import Agent, Peer
from kelp.transport.layout import peer_region

_MAX_PEERS = 256


@dataclass(eq=False)
class Connection:
    """One incarnation of a prefill worker.

    Attributes:
        channel: For its `Attach` calls.
        num_fetches: Handoffs that use the connection now.
        token: What the worker wants to be shown; None: nothing.
    """

    endpoint: str
    epoch: str
    channel: Any
    peer: Peer
    num_fetches: int = 0
    token: PeerToken | None = None

    def proven(self, first: bytes) -> bytes:
        """The first message of an `Attach` call, with its proof."""
        return seal(self.token, ATTACH_PROOF, proof_scope(self.endpoint, self.epoch), first)


class PeerDirectory:
    """Connections by endpoint. All methods belong to one event loop's thread.

    Args:
        layout: Of the local pool; peers must match it.
        connect_timeout_s: For describing a peer; connecting is bounded by the agent.
        token: What peers and we show each other; None: nothing.
    """

    def __init__(
        self, agent: Agent, layout: KVLayout, connect_timeout_s: float, token: PeerToken | None = None
    ) -> None:
        self._token = token
        self._agent = agent
        self._layout = layout
        self._connect_timeout_s = connect_timeout_s
        self._connections: dict[str, Connection] = {}
        self._opening: dict[tuple[str, str], asyncio.Task[Connection]] = {}
        self._dropping: dict[Connection, asyncio.Task[None]] = {}
        self._executor = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="kelp-kv-peers")

    @property
    def num_peers(self) -> int:
        """Connections, also those being dropped."""
        return len(self._connections) + len(self._dropping)

    def get(self, rendezvous: Rendezvous) -> asyncio.Future[Connection]:
        """The connection to the incarnation that `rendezvous` names; made if need be.

        The future is shared between callers, so none of them cancels it. It raises

            WorkerLost: Unreachable, or another incarnation answers.
            ProtocolError: The peer's pool does not match ours, or its answer is malformed.
            TransferError: The transport cannot reach it.
            CapacityError: Too many peers are in use.
        """
        known = self._connections.get(rendezvous.endpoint)
        if known is not None and known.epoch == rendezvous.prefill_epoch:
            ready: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
            ready.set_result(known)
            return ready
        key = (rendezvous.endpoint, rendezvous.prefill_epoch)
        if key not in self._opening:
            self._opening[key] = asyncio.create_task(self._open(rendezvous))
            self._opening[key].add_done_callback(lambda done: self._opened(key, done))
        return self._opening[key]

    def drop(self, connection: Connection) -> asyncio.Task[None]:
        """Disconnect; when the returned task is done, no READ from this peer writes into local memory."""
        if connection not in self._dropping:
            if self._connections.get(connection.endpoint) is connection:
                del self._connections[connection.endpoint]
            task = asyncio.create_task(self._disconnect(connection))
            self._dropping[connection] = task
            task.add_done_callback(lambda _: self._dropping.pop(connection))
        return self._dropping[connection]

    async def close(self) -> None:
        """Drop everything."""
        for opening in list(self._opening.values()):
            opening.cancel()
        await asyncio.gather(*self._opening.values(), return_exceptions=True)
        drops = [self.drop(connection) for connection in list(self._connections.values())]
        await asyncio.gather(*drops, *self._dropping.values(), return_exceptions=True)
        self._executor.shutdown(wait=False)

    async def _open(self, rendezvous: Rendezvous) -> Connection:
        self._make_room()
        endpoint = rendezvous.endpoint
        channel = grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        try:
            description = await self._describe(channel, rendezvous)
            if description.epoch != rendezvous.prefill_epoch:
                raise WorkerLost(
                    f"prefill worker {endpoint}: epoch {rendezvous.prefill_epoch} was chosen, "
                    f"{description.epoch} answers"
                )
            region = peer_region(self._layout, description)
            await self._forget_predecessor(endpoint)
            metadata = bytes.fromhex(description.agent_metadata_hex)
            loop = asyncio.get_running_loop()
            peer = await loop.run_in_executor(self._executor, self._agent.connect, metadata, region)
        except BaseException:
            await channel.close(None)
            raise
        connection = Connection(endpoint, description.epoch, channel, peer, token=self._token)
        self._connections[endpoint] = connection
        return connection

    def _opened(self, key: tuple[str, str], task: asyncio.Task[Connection]) -> None:
        del self._opening[key]
        if not task.cancelled():
            # Retrieved here, too: every caller may have been cancelled meanwhile.
            task.exception()

    async def _describe(self, channel: Any, rendezvous: Rendezvous) -> PeerDescription:
        endpoint, scope = rendezvous.endpoint, proof_scope(rendezvous.endpoint, rendezvous.prefill_epoch)
        nonce = b"" if self._token is None else secrets.token_bytes(NONCE_BYTES)
        call = channel.unary_unary(rpc_path(DESCRIBE))
        try:
            question = seal(self._token, DESCRIBE_PROOF, scope, nonce)
            raw = await call(question, timeout=self._connect_timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise WorkerLost(
                    f"prefill worker {endpoint} does not answer within {self._connect_timeout_s} s"
                ) from None
            raise from_rpc_error(error, endpoint) from None
        opened = unseal(self._token, DESCRIPTION_PROOF, scope, raw, nonce)
        return decode_message(PEER_DESCRIPTION, opened, f"description of {endpoint}")

    async def _forget_predecessor(self, endpoint: str) -> None:
        predecessor = self._connections.get(endpoint)
        if predecessor is not None:
            self.drop(predecessor)
        leaving = [task for gone, task in self._dropping.items() if gone.endpoint == endpoint]
        if leaving:
            _, stuck = await asyncio.wait(leaving, timeout=self._connect_timeout_s)
            if stuck:
                raise WorkerLost(f"prefill worker {endpoint}: the former connection does not end")

    def _make_room(self) -> None:
        if self.num_peers < _MAX_PEERS:
            return
        idle = next((known for known in self._connections.values() if known.num_fetches == 0), None)
        if idle is None:
            raise CapacityError(f"handoff: {_MAX_PEERS} prefill workers are connected")
        self.drop(idle)

    async def _disconnect(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._executor, self._agent.disconnect, connection.peer)
        finally:
            await connection.channel.close(None)
