"""The decision with everything that keeps it informed: workers, lower tiers, index, events, other routers, queue.

Puts the parts of this package together for a router that serves requests; knows neither clients nor worker streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kelp.core.clock import Clock
from kelp.core.config import KelpConfig
from kelp.core.metrics import (
    APPROXIMATE_WORKERS,
    INDEX_BYTES,
    KNOWN_ROUTERS,
    KV_EVENT_MANAGERS,
    KV_EVENT_WORKERS,
    QUEUE_LENGTH,
    STALE_ROUTERS,
    Metrics,
)
from kelp.core.model_identity import adapter_digest
from kelp.core.peer_auth import PeerToken
from kelp.core.wire import encode_message
from kelp.registry.base import KvManagerRecord, RouterRegistry, TrafficRecord, WorkerRecord
from kelp.registry.view import RecordsView, RegistryView
from kelp.router.admission import Admission
from kelp.router.capacity import Capacity
from kelp.router.decision.selector import Selector, SelectorMode
from kelp.router.decision.workers import WorkerTable
from kelp.router.feed.subscriber import EventFeed, FeedOptions
from kelp.router.feed.values import SubscriptionState
from kelp.router.index.kv_index import KVIndex
from kelp.router.ledger import Ledger
from kelp.router.lower_tiers import LowerTiers
from kelp.router.placement import Placer
from kelp.router.replicas.link import LinkParts, ReplicaLink
from kelp.router.replicas.loads import OwnLoads, PeerLoads
from kelp.router.replicas.peer_load import PeerLoad
from kelp.router.request_ids import meant_by, shown

_REPORT_S = 1.0


class Registries(NamedTuple):
    """Who there is.

    Attributes:
        workers: Read and kept fresh by the stack,
        managers: as are these: KV block managers.
        routers: Where routers find each other.
        traffic: Shares of versions, read and kept fresh as well; None where there is but one version.
    """

    workers: RegistryView
    managers: RecordsView[KvManagerRecord]
    routers: RouterRegistry
    traffic: RecordsView[TrafficRecord] | None = None


class RoutingStack:
    """Made and used on one event loop.

    Args:
        router_id: This router's name among those of the same workers; labels its gauges as well.
        registries: Whom to follow.
        token: What the processes of this deployment know; None: nobody is asked.

    Raises:
        ConfigError: A LoRA adapter cannot be read.

    Attributes:
        placer: Finds places for requests.
        on_workers: Called with the workers that may get requests, each time that the registry has been read.
        selector, table, index, ledger, lower_tiers: Its parts, for a router that leaves placing to its callers.
    """

    def __init__(
        self,
        config: KelpConfig,
        router_id: str,
        registries: Registries,
        clock: Clock,
        metrics: Metrics,
        token: PeerToken | None = None,
    ) -> None:
        self._registries = registries
        self._clock = clock
        self._metrics = metrics
        self._router_id = router_id
        self._tasks: list[asyncio.Task[None]] = []
        table = self.table = WorkerTable()
        routing = config.routing
        self.index = KVIndex(clock, routing.index_max_bytes, routing.expected_ttl_s)
        mode = SelectorMode(config.router.policy, config.router.disaggregation)
        self.selector = Selector(table, self.index, routing, clock, clock.wall_ns() % 2**32, mode)
        adapters = {name: adapter_digest(folder) for name, folder in config.model.lora_adapters.items()}
        feeding = FeedOptions(adapters, routing.events_ttl_s, token, config.peers.allow_foreign_events)
        self._feed = EventFeed(table, self.index, config.events, metrics, clock, feeding)
        lower = self.lower_tiers = LowerTiers(table, self.index, config.events, metrics, clock, feeding)
        own = OwnLoads(router_id, clock.wall_ns())
        replicas = config.replicas
        peer_load = PeerLoad(table, self.selector.load, self.selector.rates, clock)
        self._peers = PeerLoads(peer_load, replicas.lease_s, replicas.stale_s)
        link = LinkParts(own, self._peers, registries.routers, clock, self._explain_here, token)
        self._link = ReplicaLink(link, replicas)
        ledger = self.ledger = Ledger(self.selector, own, config.router.policy, metrics)
        ledger.on_news = self._link.notify
        capacity = Capacity(table, self.selector.fleet, self.selector.load, config.queue)
        self._admission = Admission(self.selector, ledger, capacity, config.queue, clock, metrics)
        workers, managers = registries.workers, registries.managers
        self.on_workers: Callable[[Sequence[WorkerRecord]], None] = lambda ready: None
        self.placer = Placer(workers, self.selector, self._admission, ledger, clock)
        self.selector.is_stale = lambda: self._peers.num_stale(clock.monotonic_s()) > 0
        self.selector.knows_all_of = self._knows_all_of
        workers.on_read = self._update
        managers.on_read = lambda: lower.set_managers(managers.records())

    @property
    def num_approximate(self) -> int:
        """Workers whose blocks are partly guessed: without events, while some were missed, or beyond the budget."""
        slots, live = self.table.slots(), SubscriptionState.LIVE
        return sum(self._feed.state(slot) is not live or self.index.is_truncated(slot) for slot in slots)

    async def start(self) -> None:
        """Read the registry and keep reading it; follow the workers' events and the other routers."""
        workers, managers, traffic = self._registries.workers, self._registries.managers, self._registries.traffic
        await workers.refresh()
        await managers.refresh()
        if traffic is not None:
            await traffic.refresh()
            self._tasks.append(asyncio.ensure_future(traffic.run()))
        await self._feed.start()
        await self.lower_tiers.feed.start()
        await self._link.start()
        self._tasks += [asyncio.ensure_future(loop) for loop in (workers.run(), managers.run(), self._report())]

    async def stop(self) -> None:
        """Leave the others and stop following."""
        for task in self._tasks:
            task.cancel()
        await self._link.stop()
        await self.lower_tiers.feed.stop()
        await self._feed.stop()

    async def explain(self, request_id: str) -> bytes | None:
        """A decision as JSON, this router's or another one's; None if nobody knows it."""
        for name in meant_by(request_id):
            document = self._explain_here(name) or await self._link.ask_all(name)
            if document is not None:
                return document
        return None

    def _explain_here(self, request_id: str) -> bytes | None:
        explanation = self.selector.explain(request_id)
        if explanation is None:
            return None
        named = {"request_id": shown(request_id), "router_id": self._router_id}
        return encode_message(explanation.model_copy(update=named))

    def _update(self) -> None:
        """The workers' view has been refreshed."""
        self.placer.update()
        self.on_workers(self._registries.workers.ready())
        self.lower_tiers.refresh()

    def _knows_all_of(self, slot: int) -> bool:
        """Whether nothing that a worker or its block manager holds is missing from the index."""
        is_live = self._feed.state(slot) is SubscriptionState.LIVE and not self.index.is_truncated(slot)
        return is_live and self.lower_tiers.is_live(slot)

    async def _report(self) -> None:
        metrics, name = self._metrics, self._router_id
        while True:
            metrics.set(INDEX_BYTES, self.index.num_bytes, router=name)
            metrics.set(APPROXIMATE_WORKERS, self.num_approximate, router=name)
            for state, number in self._feed.num_workers().items():
                metrics.set(KV_EVENT_WORKERS, number, router=name, state=state.value)
            for state, number in self.lower_tiers.feed.num_workers().items():
                metrics.set(KV_EVENT_MANAGERS, number, router=name, state=state.value)
            metrics.set(STALE_ROUTERS, self._peers.num_stale(self._clock.monotonic_s()), router=name)
            metrics.set(KNOWN_ROUTERS, self._peers.num_peers, router=name)
            metrics.set(QUEUE_LENGTH, self._admission.num_waiting, router=name)
            await asyncio.sleep(_REPORT_S)
