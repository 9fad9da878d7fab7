"""Keeps the index true to what workers, and KV block managers, say they hold.

One `EventFeed` per router and kind. It subscribes to every live worker of the table, applies events on the router's own
loop in short slices, so that requests never wait for a burst of events or a snapshot, and says per worker how far the
index may be trusted. What to ask for and when is decided in `router.feed.subscription`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import zmq

from kelp.core.clock import Clock
from kelp.core.config import EventsConfig
from kelp.core.hashing import seed_hash
from kelp.core.metrics import Metrics
from kelp.core.model_identity import lora_id
from kelp.core.peer_auth import PeerToken
from kelp.core.types import SequenceHash
from kelp.router.feed.link import WorkerLink
from kelp.router.feed.publisher import EventTarget, Publisher, Publishers, publisher_of
from kelp.router.feed.subscription import Subscription
from kelp.router.feed.values import SubscriptionState

_SLICE_S = 0.002
_TICK_S = 0.25
_TICKS_PER_REPORT = 4
_MAX_SOCKETS = 65_536
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FeedOptions:
    """What a router adds to `EventsConfig`.

    Attributes:
        adapters: Content digest of each LoRA adapter by its name, to name the blocks of foreign engines.
        ttl_s: See `router.feed.patience`.
        token: What publishers and routers know; a publisher that asks for none is followed only if
            `allow_foreign` says so.
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    ttl_s: float = 30.0
    token: PeerToken | None = None
    allow_foreign: bool = False

    def may_follow(self, publisher: Publisher) -> bool:
        """Whether it can be believed, and lets us listen."""
        if publisher.asks_token:
            return self.token is not None
        return self.token is None or self.allow_foreign


class EventFeed:
    """KV events of all workers (or managers) of a table, into an index. Everything belongs to one event loop.

    Usage: `await start()` before or after the table's first `update`, ask `state(slot)` when deciding, `await stop()`.
    It clears the slot in the index when a worker joins and when it leaves.

    Args:
        table: Whose workers to follow.
        index: Where events go.
        config: Limits and waits; with `enabled` false nobody is asked and every worker is approximate.
        metrics: Gets the counters among `kelp_kv_event_*`.
        clock: For silence, deadlines and back-off.
    """

    def __init__(
        self,
        table: Publishers,
        index: EventTarget,
        config: EventsConfig,
        metrics: Metrics,
        clock: Clock,
        options: FeedOptions | None = None,
    ) -> None:
        self._table = table
        self._index = index
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._options = options or FeedOptions()
        self._links: dict[int, WorkerLink] = {}
        self._unreachable: set[int] = set()
        self._ready: dict[int, None] = {}
        self._is_running = False
        self._ticking: asyncio.Task[None] | None = None
        table.watch(self._on_joined, self._on_left)

    async def start(self) -> None:
        """Subscribe to the table's workers, those of now and of later."""
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
        self._is_running = True
        for slot in self._table.slots():
            self._on_joined(slot)
        self._ticking = asyncio.ensure_future(self._tick())

    async def stop(self) -> None:
        """Disconnect from all; the index stays as it is. Idempotent."""
        if not self._is_running:
            return
        self._is_running = False
        assert self._ticking is not None
        self._ticking.cancel()
        await asyncio.wait({self._ticking})
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._ready.clear()
        self._context.destroy(linger=0)

    def state(self, slot: int) -> SubscriptionState:
        """How far the index may be trusted about a live worker."""
        link = self._links.get(slot)
        return SubscriptionState.APPROXIMATE if link is None else link.state

    def num_workers(self) -> dict[SubscriptionState, int]:
        """Live workers by state."""
        states = Counter(self.state(slot) for slot in self._table.slots())
        return {state: states[state] for state in SubscriptionState}

    def _on_joined(self, slot: int) -> None:
        if not self._is_running:
            return
        self._index.clear(slot)
        publisher = publisher_of(self._table.record(slot))
        if self._config.enabled and publisher.endpoint:
            self._follow(slot, publisher)

    def _follow(self, slot: int, publisher: Publisher) -> None:
        if not self._options.may_follow(publisher):
            known = "the peers' token, and here is none" if publisher.asks_token else "none, and here is one"
            self._note_unreachable(slot, publisher, f"peers.token_file: it asks for {known}")
            return
        can_ask, jitter = bool(publisher.replay_endpoint), partial(random.uniform, 0.5, 1.0)
        subscription = Subscription(self._config, can_ask, jitter, self._options.ttl_s)
        link = WorkerLink(slot, publisher, self._config, self._clock, self._seeds(publisher), subscription)
        try:
            token = self._options.token if publisher.asks_token else None
            link.open(self._context, partial(self._wake, slot), token)
        except (OSError, zmq.ZMQError) as error:
            # No address, or no descriptor left: the worker lives on expectations, and the router goes on.
            self._note_unreachable(slot, publisher, str(error))
            link.close()
            return
        self._unreachable.discard(slot)
        self._links[slot] = link
        self._wake(slot)

    def _note_unreachable(self, slot: int, publisher: Publisher, why: str) -> None:
        if slot not in self._unreachable:
            _log.warning("no events from %s (%s): %s", publisher.name, publisher.endpoint, why)
        self._unreachable.add(slot)

    def _on_left(self, slot: int) -> None:
        self._unfollow(slot)
        self._unreachable.discard(slot)
        self._index.clear(slot)

    def _unfollow(self, slot: int) -> None:
        self._ready.pop(slot, None)
        link = self._links.pop(slot, None)
        if link is not None:
            self._report(link)
            link.close()

    def _seeds(self, publisher: Publisher) -> partial[SequenceHash | None]:
        model_id = publisher.layout.model_id if publisher.layout is not None else None
        return partial(_seed, model_id, self._options.adapters)

    def _wake(self, slot: int) -> None:
        """Something came for this slot, or may have come."""
        if slot in self._links:
            if not self._ready:
                self._loop.call_soon(self._pump)
            self._ready[slot] = None

    def _pump(self) -> None:
        """One slice of work for the loop, shared among those who have some."""
        end_s = self._clock.monotonic_s() + _SLICE_S
        for slot in list(self._ready):
            del self._ready[slot]
            if self._has_more(slot, end_s):
                self._ready[slot] = None
            if self._clock.monotonic_s() >= end_s:
                break
        if self._ready:
            self._loop.call_soon(self._pump)

    def _has_more(self, slot: int, end_s: float) -> bool:
        try:
            return self._links[slot].turn(self._index, end_s)
        except Exception:
            _log.exception("events of %s not applied, starting over", publisher_of(self._table.record(slot)).name)
            self._unfollow(slot)
            self._index.clear(slot)
            return False

    async def _tick(self) -> None:
        for tick in itertools.count():
            is_report = tick % _TICKS_PER_REPORT == 0
            for slot in self._table.slots():
                if is_report or slot not in self._unreachable:
                    self._look_after(slot)
            if is_report:
                self._report_all()
            await asyncio.sleep(_TICK_S)

    def _look_after(self, slot: int) -> None:
        publisher = publisher_of(self._table.record(slot))
        endpoints = (publisher.endpoint, publisher.replay_endpoint)
        link = self._links.get(slot)
        if link is not None and link.endpoints != endpoints:
            self._unfollow(slot)
            self._index.clear(slot)
            link = None
        if link is not None:
            if link.tick():
                self._wake(slot)
        elif self._config.enabled and publisher.endpoint:
            self._follow(slot, publisher)

    def _report_all(self) -> None:
        for link in self._links.values():
            self._report(link)

    def _report(self, link: WorkerLink) -> None:
        totals = link.totals()
        for (family, kind), increase in (totals - link.reported).items():
            self._metrics.add(family, increase, kind=kind)
        link.reported = totals


def _seed(model_id: str | None, adapters: Mapping[str, str], lora_name: str, cache_salt: str) -> SequenceHash | None:
    if model_id is None or (lora_name and lora_name not in adapters):
        return None
    return seed_hash(model_id, lora_id(lora_name, adapters.get(lora_name, "")), cache_salt)
