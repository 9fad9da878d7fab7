"""The decision with everything that keeps it informed: workers, index, events, other routers, queue.

Puts the parts of this package together for a router that serves requests; knows neither clients nor worker streams.
"""

from __future__ import annotations

import asyncio

from kelp.core.clock import Clock
from kelp.core.config import KelpConfig
from kelp.core.metrics import (
    APPROXIMATE_WORKERS,
    INDEX_BYTES,
    KNOWN_ROUTERS,
    KV_EVENT_WORKERS,
    QUEUE_LENGTH,
    STALE_ROUTERS,
    Metrics,
)
from kelp.core.model_identity import adapter_digest
from kelp.core.wire import encode_message
from kelp.registry.base import RouterRegistry
from kelp.registry.view import RegistryView
from kelp.router.admission import Admission
from kelp.router.capacity import Capacity
from kelp.router.decision.selector import Selector, SelectorMode
from kelp.router.decision.workers import WorkerTable
from kelp.router.feed.subscriber import EventFeed
from kelp.router.feed.values import SubscriptionState
from kelp.router.index.kv_index import KVIndex
from kelp.router.ledger import Ledger
from kelp.router.placement import Placer
from kelp.router.replicas.link import LinkParts, ReplicaLink
from kelp.router.replicas.loads import OwnLoads, PeerLoads
from kelp.router.replicas.peer_load import PeerLoad

_REPORT_S = 1.0


class RoutingStack:
    """Made and used on one event loop.

    Args:
        router_id: This router's name among those of the same workers; labels its gauges as well.
        view: Read and kept fresh here.
        registry: Where routers find each other.

    Raises:
        ConfigError: A LoRA adapter cannot be read.

    Attributes:
        placer: Finds places for requests.
        selector, table, index, ledger: Its parts, for a router that leaves placing to its callers.
    """

    def __init__(
        self,
        config: KelpConfig,
        router_id: str,
        view: RegistryView,
        registry: RouterRegistry,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._view = view
        self._clock = clock
        self._metrics = metrics
        self._router_id = router_id
        table = self.table = WorkerTable()
        routing = config.routing
        self.index = KVIndex(clock, routing.index_max_bytes, routing.expected_ttl_s)
        mode = SelectorMode(config.router.policy, config.router.disaggregation)
        self.selector = Selector(table, self.index, routing, clock, clock.wall_ns() % 2**32, mode)
        adapters = {name: adapter_digest(folder) for name, folder in config.model.lora_adapters.items()}
        self._feed = EventFeed(table, self.index, config.events, metrics, clock, adapters)
        own = OwnLoads(router_id, clock.wall_ns())
        replicas = config.replicas
        peer_load = PeerLoad(table, self.selector.load, self.selector.rates, clock)
        self._peers = PeerLoads(peer_load, replicas.lease_s, replicas.stale_s)
        self._link = ReplicaLink(LinkParts(own, self._peers, registry, clock, self._explain_here), replicas)
        ledger = self.ledger = Ledger(self.selector, own, config.router.policy, metrics)
        ledger.on_news = self._link.notify
        capacity = Capacity(table, self.selector.fleet, self.selector.load, config.queue)
        self._admission = Admission(self.selector, ledger, capacity, config.queue, clock, metrics)
        self.placer = Placer(view, self.selector, self._admission, ledger, clock)
        self.selector.is_stale = lambda: self._peers.num_stale(clock.monotonic_s()) > 0
        view.on_read = self.placer.update

    @property
    def num_approximate(self) -> int:
        """Workers whose blocks are partly guessed: without events, while some were missed, or beyond the budget."""
        slots, live = self.table.slots(), SubscriptionState.LIVE
        return sum(self._feed.state(slot) is not live or self.index.is_truncated(slot) for slot in slots)

    async def start(self) -> None:
        """Read the registry and keep reading it; follow the workers' events and the other routers."""
        await self._view.refresh()
        await self._feed.start()
        await self._link.start()
        self._tasks = [asyncio.ensure_future(loop) for loop in (self._view.run(), self._report())]

    async def stop(self) -> None:
        """Leave the others and stop following."""
        for task in self._tasks:
            task.cancel()
        await self._link.stop()
        await self._feed.stop()

    async def explain(self, request_id: str) -> bytes | None:
        """A decision as JSON, this router's or another one's; None if nobody knows it."""
        return self._explain_here(request_id) or await self._link.ask_all(request_id)

    def _explain_here(self, request_id: str) -> bytes | None:
        explanation = self.selector.explain(request_id)
        if explanation is None:
            return None
        return encode_message(explanation.model_copy(update={"router_id": self._router_id}))

    async def _report(self) -> None:
        metrics, name = self._metrics, self._router_id
        while True:
            metrics.set(INDEX_BYTES, self.index.num_bytes, router=name)
            metrics.set(APPROXIMATE_WORKERS, self.num_approximate, router=name)
            for state, number in self._feed.num_workers().items():
                metrics.set(KV_EVENT_WORKERS, number, router=name, state=state.value)
            metrics.set(STALE_ROUTERS, self._peers.num_stale(self._clock.monotonic_s()), router=name)
            metrics.set(KNOWN_ROUTERS, self._peers.num_peers, router=name)
            metrics.set(QUEUE_LENGTH, self._admission.num_waiting, router=name)
            await asyncio.sleep(_REPORT_S)
