"""The prefill worker's handoff service: tells readers which blocks are ready, and holds these for them.

All methods belong to one event loop's thread. Moves no KV itself: readers READ through the transport.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc

from kelp.core.clock import Clock, SystemClock
from kelp.core.config import HandoffConfig
from kelp.core.errors import CapacityError, ConfigError, InternalError, KelpError, PeerRefused, WorkerLost
from kelp.core.handoff_messages import PeerDescription
from kelp.core.peer_auth import PeerToken, seal, unseal
from kelp.core.wire import encode_message
from kelp.kv.handoff.offer import Offer, OfferBoard, failed_event
from kelp.kv.handoff.session import AttachSession
from kelp.kv.handoff.wire import (
    ATTACH,
    ATTACH_PROOF,
    DESCRIBE,
    DESCRIBE_PROOF,
    DESCRIPTION_PROOF,
    NONCE_BYTES,
    SERVER_OPTIONS,
    SERVICE,
    proof_scope,
)

_log = logging.getLogger(__name__)

_SWEEPS_PER_TTL = 20
_MAX_SWEEP_INTERVAL_S = 0.5
_MARGIN_RPCS = 64
"""Calls beyond `max_readers` that are still accepted, to be described to or refused politely."""


class HandoffServer:
    """See the module docstring.

    Args:
        description: What readers need to address this worker's pool.
        max_readers: Streams attached or waiting at once; more are refused with CapacityError.
        token: What readers must know, and this worker shows them; None: nothing.
    """

    def __init__(
        self,
        description: PeerDescription,
        config: HandoffConfig,
        clock: Clock | None = None,
        max_readers: int = 256,
        token: PeerToken | None = None,
    ) -> None:
        self._description = encode_message(description)
        self._epoch = description.epoch
        self._token = token
        self._scope: tuple[str, ...] = ()
        self._config = config
        self._max_readers = max_readers
        self._sessions: dict[AttachSession, None] = {}
        self._board = OfferBoard(config.lease_ttl_s, clock or SystemClock())
        self._server: Any = None
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def num_leases(self) -> int:
        """Offers whose blocks are held."""
        return len(self._board)

    @property
    def num_readers(self) -> int:
        """Streams open."""
        return len(self._sessions)

    async def start(self, host: str, port: int = 0) -> str:
        """Bind and serve; port 0 takes a free one.

        Returns:
            The endpoint, `host:port`.

        Raises:
            ConfigError: The address cannot be bound.
        """
        assert self._server is None, "a server starts once"
        address = f"[{host}]" if ":" in host else host
        server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=self._max_readers + _MARGIN_RPCS)
        methods = {
            DESCRIBE: grpc.unary_unary_rpc_method_handler(self._describe),
            ATTACH: grpc.stream_stream_rpc_method_handler(self._attach),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        try:
            bound_port = server.add_insecure_port(f"{address}:{port}")
        except RuntimeError as error:
            raise ConfigError(f"handoff.host: {address}:{port} cannot be bound: {error}") from None
        await server.start()
        self._server = server
        self._sweeper = asyncio.create_task(self._sweep_forever())
        endpoint = f"{address}:{bound_port}"
        self._scope = proof_scope(endpoint, self._epoch)
        return endpoint

    async def stop(self) -> None:
        """End all offers and streams; idempotent.

        Blocks that were handed over may still be being read: the caller must not reuse them afterwards. A
        worker that goes on serving waits for `num_leases` 0 first.
        """
        if self._server is None:
            return
        server, self._server = self._server, None
        assert self._sweeper is not None
        self._sweeper.cancel()
        await asyncio.gather(self._sweeper, return_exceptions=True)
        self._board.end_all(WorkerLost("the prefill worker stops"))
        await server.stop(grace=0.5)

    def offer(self, handoff_id: str, on_release: Callable[[], None]) -> Offer:
        """Hold the blocks of a prompt for its reader.

        Args:
            handoff_id: By which the reader attaches.
            on_release: Called exactly once, on the loop's thread, when the blocks may be reused.

        Raises:
            ProtocolError: The id is in use.
        """
        return self._board.add(handoff_id, on_release)

    def sweep(self) -> None:
        """End the offers whose leases have run out; the server does so by itself every few percent of a ttl."""
        self._board.sweep()

    async def _sweep_forever(self) -> None:
        interval_s = min(self._config.lease_ttl_s / _SWEEPS_PER_TTL, _MAX_SWEEP_INTERVAL_S)
        while True:
            await asyncio.sleep(interval_s)
            try:
                self.sweep()
            except Exception:
                _log.exception("a lease could not be released")

    async def _describe(self, request: bytes, context: Any) -> bytes:
        try:
            nonce = unseal(self._token, DESCRIBE_PROOF, self._scope, request)
            if len(nonce) > NONCE_BYTES:
                raise PeerRefused(f"{DESCRIBE_PROOF}: {len(nonce)} bytes, at most {NONCE_BYTES} are taken")
        except PeerRefused as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.text)
        return seal(self._token, DESCRIPTION_PROOF, self._scope, self._description, nonce)

    async def _attach(self, _requests: Any, context: Any) -> None:
        if self.num_readers >= self._max_readers and not self._made_room():
            await self._refuse(context, CapacityError(f"handoff: {self._max_readers} readers are attached"))
            return
        session = AttachSession(context, self._board, self._config.attach_timeout_s, self._opened)
        self._sessions[session] = None
        try:
            await session.run()
        except Exception as error:
            _log.exception("a handoff stream failed")
            await self._refuse(context, InternalError(f"handoff: {type(error).__name__}"))
        finally:
            del self._sessions[session]

    def _made_room(self) -> bool:
        """Whether a reader that has not shown the token yet makes room: those that know it do so at once."""
        if self._token is None:
            return False
        stranger = next((session for session in self._sessions if session.is_stranger), None)
        if stranger is not None:
            stranger.is_stranger = False
            stranger.make_room()
        return stranger is not None

    def _opened(self, first: bytes) -> bytes:
        return unseal(self._token, ATTACH_PROOF, self._scope, first)

    async def _refuse(self, context: Any, error: KelpError) -> None:
        if not context.done():
            await context.write(encode_message(failed_event(error)))
