"""One publisher's subscription in operation: its sockets, its protocol, and the changes that wait to be applied."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable

import zmq

from kelp.core.clock import Clock
from kelp.core.config import EventsConfig
from kelp.core.kv_events import BlocksCleared, BlocksStored, KVEvent
from kelp.core.metrics import KV_EVENT_BLOCKS, KV_EVENT_DROPPED, KV_EVENT_RECOVERIES, MetricFamily
from kelp.core.peer_auth import PeerToken
from kelp.kv.events.codec import ForeignEvent
from kelp.kv.events.frames import SNAPSHOT_REQUEST, encode_seq
from kelp.kv.events.residency import split
from kelp.kv.events.translate import ForeignNames, SeedOf
from kelp.router.feed.inbox import EventInbox
from kelp.router.feed.publisher import EventTarget, Publisher
from kelp.router.feed.sockets import SubscriptionSockets
from kelp.router.feed.subscription import Subscription
from kelp.router.feed.values import Action, Apply, AskReplay, AskSnapshot, Forget, SubscriptionState

_MESSAGES_PER_TURN = 16
_BLOCKS_PER_STEP = 256
Totals = Counter[tuple[MetricFamily, str]]


class WorkerLink:
    """Follows one incarnation; belongs to the router's loop.

    Args:
        slot: The publisher's, in table and index.
        publisher: Where it publishes.
        seed_of: Names what foreign engines store.
        subscription: Fresh; says what to believe and to ask for.

    Attributes:
        reported: For the owner: totals that metrics already have.
    """

    def __init__(
        self,
        slot: int,
        publisher: Publisher,
        config: EventsConfig,
        clock: Clock,
        seed_of: SeedOf,
        subscription: Subscription,
    ) -> None:
        self.slot = slot
        self.endpoints = (publisher.endpoint, publisher.replay_endpoint)
        self.reported: Totals = Counter()
        self._config = config
        self._clock = clock
        self._subscription = subscription
        self._inbox = EventInbox(publisher.epoch, self._subscription, config.max_message_bytes)
        block_size = publisher.layout.block_size if publisher.layout is not None else 1
        self._names = ForeignNames(block_size, seed_of)
        self._blocks: Counter[str] = Counter()
        self._todo: deque[Forget | KVEvent | ForeignEvent] = deque()
        self._sockets: SubscriptionSockets | None = None

    @property
    def state(self) -> SubscriptionState:
        """How far the index may be trusted; what still waits to be applied is not in it."""
        state = self._subscription.state
        return SubscriptionState.RECOVERING if self._todo and state is SubscriptionState.LIVE else state

    def open(
        self, context: zmq.Context[zmq.Socket[bytes]], on_ready: Callable[[], None], token: PeerToken | None = None
    ) -> None:
        """Connect, to one who knows the token if there is one, and ask for what the worker holds."""
        self._sockets = SubscriptionSockets(context, self._config, *self.endpoints, on_ready, token)
        self._perform(self._subscription.start(self._clock.monotonic_s()))

    def close(self) -> None:
        """Disconnect; idempotent."""
        if self._sockets is not None:
            self._sockets.close()
            self._sockets = None

    def tick(self) -> bool:
        """Look at the clock; whether that left something to do."""
        self._perform(self._subscription.on_tick(self._clock.monotonic_s()))
        return bool(self._todo)

    def turn(self, index: EventTarget, end_s: float) -> bool:
        """Apply what waits, then read on, until the clock shows `end_s` or nothing is left.

        Returns:
            Whether there is more to do.
        """
        is_drained = False
        while self._sockets is not None:
            while self._todo:
                self._apply(self._todo.popleft(), index)
                if self._clock.monotonic_s() >= end_s:
                    return True
            if is_drained:
                return False
            received = self._sockets.read(_MESSAGES_PER_TURN)
            is_drained = len(received) < _MESSAGES_PER_TURN
            now_s = self._clock.monotonic_s()
            for attempt, frames in received:
                if attempt is None:
                    self._perform(self._inbox.on_live(frames, now_s))
                else:
                    self._perform(self._inbox.on_answer(attempt, frames, now_s))
        return False

    def totals(self) -> Totals:
        """Everything counted since the start, for metrics: family and label."""
        counts = self._subscription.counts
        totals: Totals = Counter({(KV_EVENT_BLOCKS, kind): number for kind, number in self._blocks.items()})
        for kind, number in counts.by_kind().items():
            totals[KV_EVENT_RECOVERIES, kind] = number
        for reason, number in (*self._inbox.num_refused.items(), *self._names.num_dropped.items()):
            totals[KV_EVENT_DROPPED, reason] = number
        return totals

    def _perform(self, actions: Iterable[Action]) -> None:
        """Ask at once; queue the rest."""
        for action in actions:
            if isinstance(action, Forget):
                self._todo.clear()
                self._todo.append(action)
            elif isinstance(action, Apply):
                for event in action.events:
                    self._queue(event)
            else:
                self._ask(action)

    def _ask(self, action: AskReplay | AskSnapshot) -> None:
        assert self._sockets is not None
        request = SNAPSHOT_REQUEST if isinstance(action, AskSnapshot) else encode_seq(action.start_seq)
        if not self._sockets.ask(action.attempt, request):
            self._perform(self._subscription.on_failed(action.attempt, self._clock.monotonic_s()))

    def _queue(self, event: KVEvent | ForeignEvent) -> None:
        if isinstance(event, KVEvent):
            for step in split([event], _BLOCKS_PER_STEP):
                self._todo.extend(step)
        else:
            self._todo.append(event)

    def _translate(self, event: ForeignEvent) -> list[KVEvent]:
        num_orphans = self._names.num_dropped["parent"]
        events = self._names.translate([event])
        if self._names.num_dropped["parent"] != num_orphans:
            self._subscription.on_orphan()
        return events

    def _apply(self, todo: Forget | KVEvent | ForeignEvent, index: EventTarget) -> None:
        if isinstance(todo, Forget):
            self._names.clear()
            index.clear(self.slot)
            return
        events = [todo] if isinstance(todo, KVEvent) else self._translate(todo)
        for event in events:
            index.apply(self.slot, event)
            if isinstance(event, BlocksCleared):
                self._blocks["cleared"] += 1
            else:
                self._blocks["stored" if isinstance(event, BlocksStored) else "removed"] += len(event.hashes)
