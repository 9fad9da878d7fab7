"""KV block managers as a router follows them: whose lower tiers they keep, and what lies there by their events.

A manager's blocks are in the index once and count for each of its workers (`router.index.sharing`). A manager that has
left the registry, or started anew, is forgotten with all its blocks; workers serve on without.
"""

from __future__ import annotations

from collections.abc import Iterable

from kelp.core.clock import Clock
from kelp.core.config import EventsConfig
from kelp.core.kv_events import KVEvent
from kelp.core.metrics import Metrics
from kelp.registry.base import KvManagerRecord
from kelp.router.decision.workers import SlotTable, WorkerTable
from kelp.router.feed.subscriber import EventFeed, FeedOptions
from kelp.router.feed.values import SubscriptionState
from kelp.router.index.kv_index import KVIndex
from kelp.router.index.sharing import shared_slot


class _ManagerBlocks:
    """The index under managers' own slots; implements `feed.publisher.EventTarget`."""

    def __init__(self, index: KVIndex) -> None:
        self._index = index

    def apply(self, slot: int, event: KVEvent) -> None:
        """See `EventTarget`."""
        self._index.apply(shared_slot(slot), event)

    def clear(self, slot: int) -> None:
        """See `EventTarget`."""
        self._index.clear(shared_slot(slot))


class LowerTiers:
    """Belongs to one event loop.

    Attributes:
        managers: Those that are known.
        feed: Their events.

    Args:
        table: The workers; records say who keeps their lower tiers.
        index: Told whose blocks count for whom.
        events: See `EventFeed`, as the rest.
    """

    def __init__(
        self,
        table: WorkerTable,
        index: KVIndex,
        events: EventsConfig,
        metrics: Metrics,
        clock: Clock,
        options: FeedOptions,
    ) -> None:
        self._table = table
        self._index = index
        self.managers: SlotTable[KvManagerRecord] = SlotTable()
        self.feed = EventFeed(self.managers, _ManagerBlocks(index), events, metrics, clock, options)
        self._numbers: dict[str, int] = {}
        table.watch(lambda _: None, lambda slot: index.share(slot, None))

    def set_managers(self, records: Iterable[KvManagerRecord]) -> None:
        """Take the registry's latest snapshot."""
        self.managers.update(records)
        self._numbers = {self.managers.record(number).manager_id: number for number in self.managers.slots()}
        self.refresh()

    def refresh(self) -> None:
        """Workers have come, or name another manager."""
        for slot in self._table.slots():
            number = self._numbers.get(self._table.record(slot).kv_manager_id)
            self._index.share(slot, None if number is None else shared_slot(number))

    def is_live(self, slot: int) -> bool:
        """Whether the index knows all that lies below a worker: none of its manager's events is missing."""
        number = self._numbers.get(self._table.record(slot).kv_manager_id)
        if number is None or self._index.is_truncated(shared_slot(number)):
            return False
        if self.managers.record(number).shares_objects:
            return False
        return self.feed.state(number) is SubscriptionState.LIVE
