"""Who publishes KV events, as far as following them needs to know: a worker or a KV block manager."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from kelp.core.kv_events import KVEvent
from kelp.registry.base import KvManagerRecord, LayoutRecord, WorkerRecord
from kelp.router.decision.workers import SlotSink


class Publisher(NamedTuple):
    """One incarnation.

    Attributes:
        name: For people.
        endpoint: `host:port` of its events; empty if it does not publish.
        replay_endpoint: `host:port` for requests; empty for none.
        layout: Of the blocks, should a foreign engine publish; None: none does.
        asks_token: Its sockets serve those who know the peers' token.
    """

    name: str
    epoch: str
    endpoint: str
    replay_endpoint: str
    layout: LayoutRecord | None
    asks_token: bool = False


def publisher_of(record: WorkerRecord | KvManagerRecord) -> Publisher:
    """Who publishes for a record."""
    name, epoch = record.key
    layout = record.layout if isinstance(record, WorkerRecord) else None
    return Publisher(name, epoch, record.events_endpoint, record.replay_endpoint, layout, record.asks_token)


class Publishers(Protocol):
    """Their table: `router.decision.workers.SlotTable` of either kind."""

    def slots(self) -> list[int]:
        """Live ones."""

    def record(self, slot: int) -> WorkerRecord | KvManagerRecord:
        """The latest record of a live slot."""

    def watch(self, on_joined: SlotSink, on_left: SlotSink) -> None:
        """Be told of slots that begin and end."""


class EventTarget(Protocol):
    """What takes the events: an index."""

    def apply(self, slot: int, event: KVEvent) -> None:
        """Take one publisher's event; events of one publisher come in order."""

    def clear(self, slot: int) -> None:
        """Forget everything about a publisher."""
