"""A worker's side of the KV block manager as a whole."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256

from kelp.client.base import KvManagerClient
from kelp.core.clock import Clock
from kelp.core.config import KelpConfig
from kelp.core.hashing import HASH_VERSION
from kelp.core.kv_manager_messages import Join, PoolRecord, SpaceRecord
from kelp.core.metrics import Metrics
from kelp.core.types import KVLayout, Role, WorkerKey
from kelp.executor.base import ExecutorRequest, TieredExecutor
from kelp.registry.base import KvManagerRecord
from kelp.transport.base import Agent
from kelp.worker.tiers.link import Links
from kelp.worker.tiers.membership import MemberParts, Membership
from kelp.worker.tiers.offloader import Offloader, OffloadParts
from kelp.worker.tiers.onboarder import Onboarder, OnboardParts
from kelp.worker.tiers.onboarding import Account

_log = logging.getLogger(__name__)
_GOODBYE_S = 5.0


@dataclass(frozen=True, slots=True)
class TierParts:
    """What a worker's tiers are made of.

    Attributes:
        managers: All live KV block managers; may block on I/O.
        agent: Has registered the executor's pool.
        name: The worker's in metrics.
    """

    key: WorkerKey
    name: str
    executor: TieredExecutor
    agent: Agent
    client: KvManagerClient
    managers: Callable[[], list[KvManagerRecord]]
    clock: Clock
    metrics: Metrics
    config: KelpConfig


class WorkerTiers:
    """Offloading and onboarding of one worker; belongs to one event loop from `start` on."""

    def __init__(self, parts: TierParts) -> None:
        self._parts = parts
        self._membership: Membership | None = None
        self._offloader: Offloader | None = None
        self._onboarder: Onboarder | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def manager_id(self) -> str:
        """The manager that keeps this worker's lower tiers now; empty for none."""
        link = None if self._membership is None else self._membership.link
        return "" if link is None else link.manager_id

    def start(self, on_change: Callable[[], None]) -> None:
        """Look for a manager from now on; before the executor's first request.

        Args:
            on_change: Called on the loop when `manager_id` has changed.
        """
        parts, offload = self._parts, self._parts.config.offload
        self._links = Links(parts.agent, parts.executor.layout.block_bytes)

        def changed() -> None:
            if self._offloader is not None:
                self._offloader.note_manager(bool(self.manager_id))
            on_change()

        membership = self._membership = Membership(self._member_parts(changed))
        loops = [membership.run()]
        shared = (membership, parts.clock, parts.metrics, offload)
        if offload.mode != "off":
            self._offloader = Offloader(OffloadParts(parts.key, parts.name, parts.executor, *shared))
            self._offloader.start()
            loops.append(self._offloader.run())
        if offload.onboard != "never":
            self._onboarder = Onboarder(OnboardParts(parts.key, parts.name, parts.executor, parts.agent, *shared))
        self._tasks = [asyncio.ensure_future(loop) for loop in loops]
        for task in self._tasks:
            task.add_done_callback(_say_if_failed)

    @asynccontextmanager
    async def onboarding(
        self, request: ExecutorRequest, account: Account, known_blocks: int | None = None
    ) -> AsyncIterator[ExecutorRequest]:
        """See `Onboarder.onboarding`."""
        if self._onboarder is None or request.role is Role.DECODE:
            yield request
            return
        async with self._onboarder.onboarding(request, account, known_blocks) as changed:
            yield changed

    async def stop(self) -> None:
        """Leave the manager; requests have ended, the executor and the agent are closed next."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._offloader is not None:
            await self._offloader.stop()
        if self._onboarder is not None:
            await self._onboarder.stop(_GOODBYE_S)
        if self._membership is not None:
            self._membership.stop()
            await self._links.close(_GOODBYE_S)
        await self._parts.client.close()

    def close(self) -> None:
        """End the threads; blocks. After `stop`."""
        if self._onboarder is not None:
            self._onboarder.close()

    def _member_parts(self, on_change: Callable[[], None]) -> MemberParts:
        parts = self._parts
        return MemberParts(
            name=parts.name,
            find=lambda failed: manager_for(
                socket.gethostname(), parts.managers(), parts.config.offload.use_other_hosts, failed
            ),
            introduce=self._introduction,
            client=parts.client,
            links=self._links,
            clock=parts.clock,
            metrics=parts.metrics,
            on_change=on_change,
            call_timeout_s=parts.config.offload.call_timeout_s,
            poll_s=parts.config.registry.heartbeat_s,
        )

    def _introduction(self) -> Join:
        layout, memory = self._parts.executor.layout, self._parts.executor.pool_memory
        pool = PoolRecord(
            agent_metadata=self._parts.agent.metadata(),
            base_address=memory.base_address,
            num_blocks=layout.num_blocks,
            block_bytes=layout.block_bytes,
            stride_bytes=layout.block_bytes,
            device=memory.device,
        )
        return Join(*self._parts.key, space=space_of(layout), pool=pool)


def space_of(layout: KVLayout) -> SpaceRecord:
    """What must be equal for blocks to mean the same."""
    return SpaceRecord(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        block_size=layout.block_size,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        model_id=layout.model_id,
        hash_version=HASH_VERSION,
    )


def manager_for(
    host: str, records: list[KvManagerRecord], use_other_hosts: bool, failed: Sequence[str] = ()
) -> KvManagerRecord | None:
    """The manager of a host that has shown itself last; of another host where there is none, if that may be.

    Heartbeats of different hosts tell nothing of each other: their clocks may be hours apart. So all workers of a host
    agree by name on a manager elsewhere, and different hosts on different ones. Those whose epochs are in `failed`, the
    last to fail at its end, come last, and in that order.
    """

    def preference(record: KvManagerRecord) -> tuple[int, bytes, int]:
        name = sha256(f"{host} {record.manager_id}".encode()).digest()
        return -(failed.index(record.epoch) + 1 if record.epoch in failed else 0), name, record.heartbeat_ns

    if here := [record for record in records if record.host == host]:
        return max(here, key=lambda record: record.heartbeat_ns)
    return max(records, key=preference, default=None) if use_other_hosts else None


def _say_if_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.error("a task of the worker's lower tiers has failed", exc_info=task.exception())
