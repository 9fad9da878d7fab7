"""Asking the manager for a prompt's blocks before it is run, where that can pay."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from kelp.core.clock import Clock
from kelp.core.config_kv import OffloadConfig
from kelp.core.errors import KelpError, NotFound
from kelp.core.hashing import sequence_hashes, tenant_digest
from kelp.core.kv_manager_messages import Await, Leased, Onboard, Release
from kelp.core.kv_manager_values import SlotRef
from kelp.core.metrics import ONBOARD_BLOCKS, ONBOARD_REQUESTS, Metrics
from kelp.core.types import BlockId, Role, SequenceHash, WorkerKey
from kelp.executor.base import Completed, ExecutorEvent, ExecutorRequest, TieredExecutor
from kelp.kv.handoff.reads import ReadLoop
from kelp.transport.base import Agent
from kelp.worker.tiers.bringing import Bringing, Goods
from kelp.worker.tiers.content import PoolContent
from kelp.worker.tiers.leases import Lease
from kelp.worker.tiers.membership import Membership
from kelp.worker.tiers.onboarding import Account, Offer, Onboarding
from kelp.worker.tiers.rates import Rates
from kelp.worker.tiers.slot_reads import SlotReads

_READ_BYTES = 16 * 1024 * 1024
"""Posting may copy on the spot; smaller READs keep the thread fair, and a part is checked while the next is READ."""
_AWAIT_MARGIN_S = 1.0
"""`Await` is answered after half a second at the latest."""
_MAX_BLOCKS = 16384
_MAX_RECOMPUTE_S = 86400.0
_NOBODY = tenant_digest("")


@dataclass(frozen=True, slots=True)
class OnboardParts:
    """What an onboarder needs; `key` is the worker's."""

    key: WorkerKey
    name: str
    executor: TieredExecutor
    agent: Agent
    membership: Membership
    clock: Clock
    metrics: Metrics
    config: OffloadConfig


class Onboarder:
    """All onboardings of a worker; belongs to one event loop. Implements `onboarding.Desk`."""

    def __init__(self, parts: OnboardParts) -> None:
        self._parts = parts
        self.executor = parts.executor
        self.clock = parts.clock
        layout = parts.executor.layout
        self._block_size = layout.block_size
        self._step = max(1, _READ_BYTES // layout.block_bytes)
        self._reads = ReadLoop(parts.agent, parts.clock, parts.config.onboard_timeout_s)
        self._content = PoolContent(layout, parts.executor.pool_memory)
        self._checks = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kelp-kv-checks")
        self._rates = Rates()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def onboarding(
        self, request: ExecutorRequest, account: Account, known_blocks: int | None = None
    ) -> AsyncIterator[ExecutorRequest]:
        """Yields the request to submit inside the block, which ends when the request is over or was aborted.

        Args:
            request: As the router asked for it.
            account: See `Onboarding`.
            known_blocks: Leading blocks that the router knows here or below (`GenerateCommand.lower_tier_blocks`);
                where the cache has nearly as many, nobody is asked. None: it may not know all.
        """
        offer = await self._seek(request, known_blocks)
        if offer is None:
            yield self._measured(request)
            return
        onboarding = Onboarding(self, request, offer, account)
        self._keep(onboarding.task)
        try:
            yield onboarding.request
        finally:
            onboarding.close()

    def bring(self, offer: Offer, goods: Goods) -> Bringing:
        """See `Desk`."""
        reads = SlotReads(offer.lease.link, self._reads, self._parts.membership.drop)
        return Bringing(goods, offer.lease, reads, lambda known: self._ask(offer.lease, known), self._check, self._step)

    def end(self, offer: Offer, corrupt: Sequence[SequenceHash]) -> None:
        """See `Desk`."""
        self._release(offer.lease, corrupt)

    def count(self, num_blocks: int, outcome: str) -> None:
        """See `Desk`."""
        if num_blocks > 0:
            self._parts.metrics.add(ONBOARD_BLOCKS, num_blocks, worker=self._parts.name, outcome=outcome)

    async def stop(self, timeout_s: float) -> None:
        """Wait for a while until nothing is held any more; requests have ended."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self) -> None:
        """End the threads; blocks. The agent must be closed next."""
        self._reads.close()
        self._checks.shutdown(wait=True)

    async def _seek(self, request: ExecutorRequest, known_blocks: int | None) -> Offer | None:
        link, config = self._parts.membership.link, self._parts.config
        num_blocks = min((len(request.prompt) - 1) // self._block_size, _MAX_BLOCKS)
        if link is None or num_blocks < config.min_onboard_blocks or request.role is Role.DECODE:
            return None
        names = sequence_hashes(request.prompt, self._block_size, request.seed_hash)[:num_blocks]
        first = self.executor.count_cached(names)
        num_tokens = (num_blocks - first) * self._block_size
        num_hoped = num_blocks if known_blocks is None else min(num_blocks, known_blocks)
        if num_hoped - first < config.min_onboard_blocks:
            return None
        if config.onboard != "always" and not self._rates.is_worth_asking(num_tokens, first * self._block_size):
            return None
        lease = self._parts.membership.leases.open(link)
        asking: asyncio.Task[Leased | None] = asyncio.ensure_future(self._onboard(lease, request, names[first:], first))
        try:
            leased = await asyncio.shield(asking)
        except asyncio.CancelledError:
            # The manager may have granted it: it is released when that is known.
            asking.add_done_callback(lambda _: self._release(lease, ()))
            raise
        outcome = "failed" if leased is None else "hit" if leased.num_blocks else "miss"
        self._parts.metrics.add(ONBOARD_REQUESTS, worker=self._parts.name, outcome=outcome)
        if leased is None or not leased.num_blocks:
            self._parts.membership.leases.close(lease)
            return None
        return Offer(lease, leased, names[: first + leased.num_blocks], first, config.onboard_timeout_s)

    async def _onboard(
        self, lease: Lease, request: ExecutorRequest, names: Sequence[SequenceHash], first: int
    ) -> Leased | None:
        config, clock = self._parts.config, self._parts.clock
        recompute = None
        if config.onboard != "always":
            recompute = self._rates.recompute(len(names) * self._block_size, first * self._block_size)
        operation = Onboard(
            *self._parts.key,
            lease_id=lease.lease_id,
            tenant=request.tenant or _NOBODY,
            hashes=tuple(names),
            first_position=first,
            recompute_s=min(recompute.seconds, _MAX_RECOMPUTE_S) if recompute is not None else 0.0,
            timeout_s=config.onboard_timeout_s,
            quadratic_share=recompute.quadratic_share if recompute is not None else 0.0,
        )
        sent_s = clock.monotonic_s()
        try:
            result = await self._parts.membership.call(lease.link, operation, config.call_timeout_s)
        except KelpError:
            return None
        if not isinstance(result, Leased) or result.num_blocks > len(names):
            return None
        self._rates.note_call(clock.monotonic_s() - sent_s)
        lease.renewed(sent_s)
        return result

    async def _ask(self, lease: Lease, num_known: int) -> Leased:
        operation = Await(*self._parts.key, lease_id=lease.lease_id, num_known=num_known)
        timeout_s = self._parts.config.call_timeout_s + _AWAIT_MARGIN_S
        result = await self._parts.membership.call(lease.link, operation, timeout_s)
        if isinstance(result, Leased):
            return result
        lease.is_lost = True
        raise NotFound("onboarding: the lease is gone")

    async def _check(
        self, names: Sequence[SequenceHash], references: Sequence[SlotRef], block_ids: Sequence[BlockId]
    ) -> int:
        if not self._parts.config.verify_checksums:
            return len(block_ids)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._checks, self._content.num_right, names, references, block_ids)

    def _release(self, lease: Lease, corrupt: Sequence[SequenceHash]) -> None:
        self._parts.membership.leases.close(lease)
        self.count(len(corrupt), "corrupt")
        self._keep(asyncio.ensure_future(self._send_release(lease, corrupt)))

    async def _send_release(self, lease: Lease, corrupt: Sequence[SequenceHash]) -> None:
        num_read, read_s = lease.traffic.num_blocks, lease.traffic.busy_s
        release = Release(*self._parts.key, (lease.lease_id,), tuple(corrupt), num_read, read_s)
        try:
            await self._parts.membership.call(lease.link, release, self._parts.config.call_timeout_s)
        except KelpError:
            # Nobody renews it: it ends by itself.
            return

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _measured(self, request: ExecutorRequest) -> ExecutorRequest:
        """Have the request show what its prefill takes."""
        loop, pass_on, num_tokens = asyncio.get_running_loop(), request.sink, len(request.prompt)

        def sink(event: ExecutorEvent) -> None:
            if isinstance(event, Completed):
                loop.call_soon_threadsafe(self._rates.note_prefill, num_tokens, event)
            pass_on(event)

        return replace(request, sink=sink)
