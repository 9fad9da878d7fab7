"""A worker without an engine: a pool of random KV blocks, stored and onboarded by the worker's own code."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kelp.client.base import WorkerAddress
from kelp.core.clock import SystemClock
from kelp.core.hashing import seed_hash, sequence_hashes, tenant_digest
from kelp.core.kv_manager_messages import (
    Await,
    Commit,
    GetStats,
    Join,
    Joined,
    Leased,
    OfferedBlock,
    Onboard,
    PoolRecord,
    Release,
    Renew,
    Renewed,
    Stats,
    Store,
    Stored,
)
from kelp.core.kv_manager_values import SlotRef
from kelp.core.types import BlockId, KVLayout, SequenceHash, Tier
from kelp.executor.base import PoolMemory
from kelp.kv.handoff.reads import ReadLoop
from kelp.transport import open_agent
from kelp.transport.base import Region
from kelp.worker.tiers.bringing import Bringing, Goods
from kelp.worker.tiers.content import PoolContent
from kelp.worker.tiers.leases import LeaseBook
from kelp.worker.tiers.link import Link
from kelp.worker.tiers.service import space_of
from kelp.worker.tiers.slot_reads import SlotReads
from perf.kv.manager_link import SocketManagerClient
from perf.suite import BenchError

_STORE_BYTES = _READ_BYTES = 16 * 1024 * 1024
"""As the worker's offloader and onboarder have it."""
_TIMEOUT_S = 60.0
_RENEWALS_PER_TTL = 3
_TENANT = tenant_digest("")
_NAME, _EPOCH = "bench-worker", "e"


def names_of(seed: int, layout: KVLayout) -> list[SequenceHash]:
    """Names of one prompt's blocks, as many as the pool has."""
    tokens = np.random.default_rng(seed).integers(0, 2**31 - 1, layout.num_blocks * layout.block_size, dtype=np.int32)
    return sequence_hashes(tokens, layout.block_size, seed_hash(layout.model_id))


@dataclass(frozen=True, slots=True)
class Onboarded:
    """How an onboarding went; `tiers` are counts by `Tier`."""

    seconds: float
    num_blocks: int
    tiers: tuple[int, ...]

    def require(self, num_blocks: int, tier: Tier) -> float:
        """The seconds.

        Raises:
            BenchError: Not all came, or not from there.
        """
        if self.num_blocks != num_blocks or self.tiers[list(Tier).index(tier)] != num_blocks:
            raise BenchError(f"{self.num_blocks} of {num_blocks} blocks came, by tier {self.tiers}")
        return self.seconds


class PoolWorker:
    """Belongs to one event loop; `join` first."""

    def __init__(self, layout: KVLayout, client: SocketManagerClient) -> None:
        self.layout = layout
        self._client = client
        shape = (layout.num_blocks, layout.block_bytes)
        self._content = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        self.pool: np.ndarray[Any, np.dtype[np.uint8]] = self._content.copy()
        self._agent = open_agent("nixl", _NAME)
        base = int(self.pool.ctypes.data)
        self._agent.register(Region(base, *shape, "cpu"), self.pool)
        self._check = PoolContent(layout, PoolMemory(base, self.pool.nbytes, "cpu", self.pool))
        self._reads = ReadLoop(self._agent, SystemClock(), _TIMEOUT_S)
        self._leases = LeaseBook()
        self._numbers = itertools.count(1)
        self._link: Link | None = None
        self._renewing: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Introduce the pool, and connect to the host tier.

        Raises:
            BenchError: The manager refuses.
        """
        layout = self.layout
        address, stride = int(self.pool.ctypes.data), layout.block_bytes
        pool = PoolRecord(self._agent.metadata(), address, layout.num_blocks, layout.block_bytes, stride, "cpu")
        joined = await self._client.ask(Join(_NAME, _EPOCH, space_of(layout), pool))
        if not isinstance(joined, Joined):
            raise BenchError(f"join: {joined}")
        theirs = joined.pool
        region = Region(theirs.base_address, theirs.num_blocks, theirs.block_bytes, theirs.device, theirs.stride_bytes)
        peer = await asyncio.to_thread(self._agent.connect, theirs.agent_metadata, region)
        self._link = Link("m", WorkerAddress("", ""), joined.manager_epoch, joined.lease_ttl_s, theirs, peer)
        self._renewing = asyncio.ensure_future(self._renew_forever(self._link))

    async def store(self, names: Sequence[SequenceHash]) -> float:
        """Offer the pool's blocks under these names, and commit; returns the seconds.

        Raises:
            BenchError: The manager did not read all of them.
        """
        self.pool[: len(names)] = self._content[: len(names)]
        step = max(1, _STORE_BYTES // self.layout.block_bytes)
        started_s = time.perf_counter()
        for begin in range(0, len(names), step):
            await self._store(names, begin, min(begin + step, len(names)))
        return time.perf_counter() - started_s

    async def _store(self, names: Sequence[SequenceHash], begin: int, end: int) -> None:
        blocks = tuple(
            OfferedBlock(names[index], names[index - 1] if index else b"", index, index) for index in range(begin, end)
        )
        store = Store(_NAME, _EPOCH, next(self._numbers), _TENANT, _TIMEOUT_S, blocks)
        stored = await self._client.ask(store)
        if stored != Stored(end - begin, 0):
            raise BenchError(f"store: {stored}")
        await self._client.ask(Commit(_NAME, _EPOCH, store.store_id))

    async def onboard(self, names: Sequence[SequenceHash]) -> Onboarded:
        """Bring blocks into the pool, whose former content is overwritten before, and check them.

        Raises:
            BenchError: The manager refuses.
            KelpError: A READ failed.
        """
        assert self._link is not None
        self.pool[: len(names)] = 0
        lease = self._leases.open(self._link)
        reads = SlotReads(self._link, self._reads, _never_drop)
        goods = Goods(names, [BlockId(index) for index in range(len(names))], 0)
        step = max(1, _READ_BYTES // self.layout.block_bytes)

        async def ask(num_known: int) -> Leased:
            return _leased(await self._client.ask(Await(_NAME, _EPOCH, lease.lease_id, num_known)))

        bringing = Bringing(goods, lease, reads, ask, self._count_right, step)
        operation = Onboard(_NAME, _EPOCH, lease.lease_id, _TENANT, tuple(names), 0, 0.0, _TIMEOUT_S)
        started_s, sent_s = time.perf_counter(), time.monotonic()
        leased = _leased(await self._client.ask(operation))
        lease.renewed(sent_s)
        await bringing.run(leased)
        seconds = time.perf_counter() - started_s
        await bringing.stop()
        self._leases.close(lease)
        await self._client.ask(Release(_NAME, _EPOCH, (lease.lease_id,)))
        return Onboarded(seconds, bringing.num_right, leased.tiers)

    async def drop_from_host(self, names: Sequence[SequenceHash]) -> None:
        """Have the manager forget what the host tier has of these, by calling it damaged; lower tiers keep theirs."""
        await self._client.ask(Release(_NAME, _EPOCH, (), tuple(names)))

    async def stats(self) -> dict[str, float]:
        """What the manager counts."""
        stats = await self._client.ask(GetStats())
        assert isinstance(stats, Stats)
        return stats.values

    def close(self) -> None:
        """End the thread and the agent."""
        if self._renewing is not None:
            self._renewing.cancel()
        self._reads.close()
        self._agent.close()

    async def _renew_forever(self, link: Link) -> None:
        """Who is not heard of is forgotten, also while it waits for its blocks to reach the object store."""
        while True:
            asked, sent_s = self._leases.of(link), time.monotonic()
            answer = await self._client.ask(Renew(_NAME, _EPOCH, tuple(lease.lease_id for lease in asked)))
            if isinstance(answer, Renewed):
                self._leases.renewed(asked, answer.lease_ids, sent_s)
            await asyncio.sleep(link.ttl_s / _RENEWALS_PER_TTL)

    async def _count_right(
        self, names: Sequence[SequenceHash], references: Sequence[SlotRef], block_ids: Sequence[BlockId]
    ) -> int:
        return await asyncio.to_thread(self._check.num_right, names, references, block_ids)


def _leased(result: object) -> Leased:
    if not isinstance(result, Leased):
        raise BenchError(f"onboard: {result}")
    return result


def _never_drop(link: Link) -> asyncio.Task[None]:
    raise BenchError("onboard: a READ failed")
