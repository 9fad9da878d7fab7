"""Whether a router's index says what the workers really hold."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kelp.core.clock import SystemClock
from kelp.core.config import EventsConfig
from kelp.core.metrics import Metrics
from kelp.core.peer_auth import PeerToken
from kelp.core.types import SequenceHash
from kelp.registry.base import WorkerRecord
from kelp.router.decision.workers import WorkerTable
from kelp.router.feed.subscriber import EventFeed, FeedOptions
from kelp.router.feed.values import SubscriptionState
from kelp.router.index.kv_index import KVIndex
from support.waiting import until


def blocks_held(
    records: Sequence[WorkerRecord], prompts: Sequence[Sequence[SequenceHash]], token: PeerToken | None
) -> list[dict[str, int]]:
    """How many leading blocks of each prompt each worker has, by a snapshot that each of them gives now.

    Workers without any are left out.
    """
    return asyncio.run(_ask(records, prompts, FeedOptions(token=token)))


async def _ask(
    records: Sequence[WorkerRecord], prompts: Sequence[Sequence[SequenceHash]], options: FeedOptions
) -> list[dict[str, int]]:
    table, index = WorkerTable(), KVIndex(SystemClock())
    feed = EventFeed(table, index, EventsConfig(), Metrics(), SystemClock(), options)
    await feed.start()
    try:
        table.update(records)
        await until(lambda: all(feed.state(slot) is SubscriptionState.LIVE for slot in table.slots()), "snapshots")
        held = []
        for names in prompts:
            found = index.match(names)
            pairs = zip(found.slots.tolist(), found.blocks[:, -1].tolist(), strict=True)
            held.append({table.record(slot).worker_id: count for slot, count in pairs})
        return held
    finally:
        await feed.stop()
