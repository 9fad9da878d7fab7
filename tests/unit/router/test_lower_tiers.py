"""Block managers as the router follows them, over real sockets: whose workers have what, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from kelp.core.clock import SystemClock
from kelp.core.config import EventsConfig
from kelp.core.kv_events import BlocksRemoved, BlocksStored
from kelp.core.metrics import Metrics
from kelp.core.types import Tier
from kelp.kv.events import EventPublisher
from kelp.registry.base import KvManagerRecord
from kelp.router.decision.workers import WorkerTable
from kelp.router.feed.subscriber import FeedOptions
from kelp.router.index.kv_index import KVIndex
from kelp.router.lower_tiers import LowerTiers
from support.selector_rig import hashes, worker
from support.waiting import until

CONFIG = EventsConfig(flush_interval_s=0.001, digest_interval_s=0.05, request_timeout_s=1.0, max_backoff_s=1.0)
NAMES = hashes(*range(10))


@contextlib.contextmanager
def publishing(epoch: str = "1", num_host: int = 0) -> Iterator[EventPublisher]:
    publisher = EventPublisher(epoch, 16, CONFIG, SystemClock())
    publisher.start()
    if num_host:
        publisher.sink(BlocksStored(NAMES[:num_host], None, Tier.HOST))
    try:
        yield publisher
    finally:
        publisher.close()


def manager(publisher: EventPublisher | None, name: str = "m", epoch: str = "1") -> KvManagerRecord:
    return KvManagerRecord(
        manager_id=name,
        epoch=epoch,
        host="here",
        endpoint="127.0.0.1:1",
        model_name="kv_block_manager",
        events_endpoint="" if publisher is None else publisher.endpoint,
        replay_endpoint="" if publisher is None else publisher.replay_endpoint,
    )


@dataclass
class Below:
    table: WorkerTable
    index: KVIndex
    tiers: LowerTiers

    def rows(self) -> dict[str, list[int]]:
        found = self.index.match(NAMES)
        ids = [self.table.record(slot).worker_id for slot in found.slots.tolist()]
        return dict(zip(ids, found.blocks.tolist(), strict=True))

    async def shows(self, **rows: list[int]) -> None:
        await until(lambda: self.rows() == rows, f"{rows}, not {self.rows()}")


@contextlib.asynccontextmanager
async def following(**managers: str) -> AsyncIterator[Below]:
    """Workers by the manager that each names."""
    clock = SystemClock()
    table, index = WorkerTable(), KVIndex(clock)
    tiers = LowerTiers(table, index, CONFIG, Metrics(), clock, FeedOptions(ttl_s=60.0))
    table.update(worker(name, kv_manager_id=manager_id) for name, manager_id in managers.items())
    await tiers.feed.start()
    try:
        yield Below(table, index, tiers)
    finally:
        await tiers.feed.stop()


def test_what_a_manager_holds_is_found_for_all_its_workers_and_nobody_else() -> None:
    async def scenario() -> None:
        with publishing(num_host=4) as publisher:
            async with following(a="m", b="m", c="another", d="") as below:
                below.index.apply(0, BlocksStored(NAMES[:2], None))
                below.tiers.set_managers([manager(publisher)])
                await below.shows(a=[2, 4, 4, 4], b=[0, 4, 4, 4])
                publisher.sink(BlocksStored(NAMES[4:7], NAMES[3], Tier.DISK))
                await below.shows(a=[2, 4, 7, 7], b=[0, 4, 7, 7])
                publisher.sink(BlocksRemoved(NAMES[:1], Tier.HOST))
                await below.shows(a=[2, 4, 7, 7])

    asyncio.run(scenario())


def test_a_manager_that_has_gone_or_started_anew_is_forgotten() -> None:
    async def scenario() -> None:
        with publishing("1", 4) as first, publishing("2", 3) as second:
            async with following(a="m") as below:
                below.tiers.set_managers([manager(first)])
                await below.shows(a=[0, 4, 4, 4])
                below.tiers.set_managers([manager(second, epoch="2")])
                assert below.rows() == {}
                await below.shows(a=[0, 3, 3, 3])
                below.tiers.set_managers([])
                assert below.rows() == {}
                assert below.index.num_blocks == 0

    asyncio.run(scenario())


def test_a_worker_that_changes_over_has_its_new_managers_blocks() -> None:
    async def scenario() -> None:
        with publishing(num_host=4) as first, publishing(num_host=2) as second:
            async with following(a="", b="n") as below:
                below.tiers.set_managers([manager(first, "m"), manager(second, "n")])
                await below.shows(b=[0, 2, 2, 2])
                below.table.update([worker("a", kv_manager_id="n"), worker("b", kv_manager_id="m")])
                below.tiers.refresh()
                await below.shows(a=[0, 2, 2, 2], b=[0, 4, 4, 4])

    asyncio.run(scenario())


def test_a_new_worker_in_an_old_ones_slot_does_not_inherit_its_manager() -> None:
    async def scenario() -> None:
        with publishing(num_host=4) as publisher:
            async with following(a="m") as below:
                below.tiers.set_managers([manager(publisher)])
                await below.shows(a=[0, 4, 4, 4])
                below.table.update([worker("b")])
                assert below.table.slots() == [0]
                assert below.rows() == {}

    asyncio.run(scenario())


def test_only_a_manager_whose_events_are_all_there_is_known_well_enough_to_be_left_unasked() -> None:
    async def scenario() -> None:
        with publishing(num_host=4) as publisher:
            async with following(a="m", b="") as below:
                assert not below.tiers.is_live(0)
                below.tiers.set_managers([manager(None)])
                assert not below.tiers.is_live(0)
                below.tiers.set_managers([manager(publisher)])
                assert not below.tiers.is_live(0)
                await until(lambda: below.tiers.is_live(0), "the manager being live")
                assert not below.tiers.is_live(1)
                below.tiers.set_managers([manager(publisher).model_copy(update={"shares_objects": True})])
                assert not below.tiers.is_live(0)

    asyncio.run(scenario())
