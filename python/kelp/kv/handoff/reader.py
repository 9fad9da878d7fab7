"""The decode worker's side of handoffs: fetches prompts' KV from prefill workers.

All methods belong to one event loop's thread; the transport's blocking calls run in threads of its own.
"""

from __future__ import annotations

import asyncio

from kelp.core.clock import Clock, SystemClock
from kelp.core.config import HandoffConfig
from kelp.core.errors import DeadlineExceeded
from kelp.core.messages import Rendezvous
from kelp.core.peer_auth import PeerToken
from kelp.core.types import KVLayout, num_blocks_for
from kelp.kv.handoff.fetch import Fetch, FetchContext, FetchPlan, FetchResult
from kelp.kv.handoff.peers import Connection, PeerDirectory
from kelp.kv.handoff.reads import ReadLoop
from kelp.kv.handoff.stream import AttachStream, StreamEvents
from kelp.transport.base import Agent

_ANSWER_TIMEOUTS = 2
"""Attaching waits for the peer's own `attach_timeout_s`, its offer's, and the way there and back."""


class HandoffReader:
    """See the module docstring.

    Args:
        agent: Has registered the local pool; the caller closes it after the reader.
        layout: Of the local pool.
        token: What prefill workers and this one show each other; None: nothing.
    """

    def __init__(
        self,
        agent: Agent,
        layout: KVLayout,
        config: HandoffConfig,
        clock: Clock | None = None,
        token: PeerToken | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._layout = layout
        self._answer_timeout_s = _ANSWER_TIMEOUTS * config.attach_timeout_s
        self._peers = PeerDirectory(agent, layout, config.attach_timeout_s, token)
        self._reads = ReadLoop(agent, self._clock, config.transfer_timeout_s)
        self._context = FetchContext(
            self._reads,
            self._peers,
            self._clock,
            layout.block_size,
            layout.block_bytes,
            config.transfer_timeout_s,
        )
        self._num_fetches = 0
        self._farewells: set[asyncio.Task[None]] = set()

    @property
    def num_fetches(self) -> int:
        """Fetches running."""
        return self._num_fetches

    @property
    def num_peers(self) -> int:
        """Prefill workers connected."""
        return self._peers.num_peers

    async def fetch(self, rendezvous: Rendezvous, plan: FetchPlan) -> FetchResult:
        """Bring a prompt's KV into local blocks while the prefill worker computes it.

        Returns or raises, also when cancelled, only after every READ into the plan's blocks has stopped.

        Raises:
            QuarantinedTransferError: The one exception to that rule, raised even in place of a cancellation: the
                blocks must not be reused before its `quarantine_released` returns.
            FatalTransferError: The peer or the lease is gone; compute the prompt.
            RetryableTransferError: The transport failed; another fetch may work.
            WorkerLost: The peer is unreachable, restarted or silent.
            NotFound: The peer does not know the handoff.
            ProtocolError: The peer broke the protocol, or its pool is not compatible.
            DeadlineExceeded: The plan's deadline passed.
            KelpError: Whatever made the prefill fail.
        """
        assert len(plan.block_ids) == num_blocks_for(plan.num_prompt_tokens, self._layout.block_size)
        assert 0 <= plan.num_cached_blocks <= len(plan.block_ids)
        self._num_fetches += 1
        try:
            connection = await self._connect(rendezvous, plan)
            connection.num_fetches += 1
            try:
                return await self._run(connection, rendezvous.handoff_id, plan)
            finally:
                connection.num_fetches -= 1
        finally:
            self._num_fetches -= 1

    async def close(self) -> None:
        """Disconnect from all peers; fetches must have ended."""
        assert self._num_fetches == 0, "fetches end before their reader"
        await asyncio.gather(*self._farewells, return_exceptions=True)
        await self._peers.close()
        await asyncio.get_running_loop().run_in_executor(None, self._reads.close)

    async def _connect(self, rendezvous: Rendezvous, plan: FetchPlan) -> Connection:
        remaining_s = None if plan.deadline_s is None else max(0.0, plan.deadline_s - self._clock.monotonic_s())
        connecting = self._peers.get(rendezvous)
        await asyncio.wait({connecting}, timeout=remaining_s)
        if not connecting.done():
            raise DeadlineExceeded(f"handoff: {rendezvous.endpoint} was not connected before the deadline")
        return connecting.result()

    async def _run(self, connection: Connection, handoff_id: str, plan: FetchPlan) -> FetchResult:
        fetch = Fetch(self._context, connection, plan)
        events = StreamEvents(fetch.on_event, fetch.on_broken)
        stream = AttachStream(connection, handoff_id, self._clock, self._answer_timeout_s, events)
        try:
            return await fetch.run(stream)
        finally:
            farewell = asyncio.create_task(stream.finish())
            self._farewells.add(farewell)
            farewell.add_done_callback(self._farewells.discard)
