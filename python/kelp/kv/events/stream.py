"""The publisher without its sockets: numbers the changes of one incarnation, repeats them, and gives snapshots.

The engine's thread only appends to a queue; all else happens in the publishing thread. Nothing is ever lost on the way:
when that thread falls behind, the engine's thread files the oldest events itself, and what is held at once bounds what
waits. So a subscriber's gap comes from the network alone, or from asking for batches older than the ring.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from kelp.core.clock import Clock
from kelp.core.config import EventsConfig
from kelp.core.kv_events import BlocksCleared, KVEvent
from kelp.core.types import Tier
from kelp.kv.events.codec import DigestExtension, Extension, SnapshotExtension, encode_batch
from kelp.kv.events.frames import digest_topic, encode_seq, events_topic, snapshot_topic
from kelp.kv.events.residency import Parents, Residency, runs, split

MAX_BATCH_BLOCKS = 4096
_NS_PER_S = 1e9


class StreamMessage(NamedTuple):
    """One message, without the address that a ROUTER puts before it."""

    topic: bytes
    seq: int
    payload: bytes

    def frames(self) -> list[bytes]:
        """As they follow each other on the wire."""
        return [self.topic, encode_seq(self.seq), self.payload]


class EventStream:
    """Events of one incarnation in order. `put` belongs to the engine's thread, the rest to the publishing one.

    The first batch clears everything, so every sequence of batches from 0 on is the whole truth.
    """

    def __init__(self, epoch: str, block_size: int, config: EventsConfig, clock: Clock) -> None:
        self._epoch = epoch
        self._topic = events_topic(epoch)
        self._block_size = block_size
        self._config = config
        self._clock = clock
        self._queue: deque[KVEvent] = deque()
        self._lock = threading.Lock()
        self._residency = Residency()
        self._residency.apply(BlocksCleared())
        self._next_seq = 0
        self._ring: deque[StreamMessage] = deque()
        self._ring_bytes = 0

    @property
    def last_seq(self) -> int:
        """Number of the last batch; -1 before the first."""
        return self._next_seq - 1

    def put(self, event: KVEvent) -> None:
        """Take one event of the engine; never waits for the network."""
        queue = self._queue
        queue.append(event)
        if len(queue) > self._config.max_queued_events:
            with self._lock:
                self._file(self._config.max_queued_events // 16)

    def flush(self) -> list[StreamMessage]:
        """Number what has changed; the messages are to be sent in this order."""
        with self._lock:
            self._file(len(self._queue))
            changes = self._residency.take_changes()
        return self._number(changes)

    def snapshot(self) -> tuple[list[StreamMessage], Iterator[StreamMessage]]:
        """Everything held, as of the last batch.

        Returns:
            What has changed and is to be sent first, as by `flush`, and the parts of the snapshot.
        """
        with self._lock:
            self._file(len(self._queue))
            changes = self._residency.take_changes()
            tiers = self._residency.copy()
        messages = self._number(changes)
        return messages, self._parts(tiers, self.last_seq)

    def replay(self, start_seq: int) -> Iterator[StreamMessage]:
        """Batches from `start_seq` to the last one of now, as far back as they are kept when their turn comes."""
        end_seq = self._next_seq
        while self._ring:
            first_seq = self._ring[0].seq
            start_seq = max(start_seq, first_seq)
            if start_seq >= end_seq:
                return
            yield self._ring[start_seq - first_seq]
            start_seq += 1

    def digest(self) -> StreamMessage:
        """What all batches so far add up to."""
        extension = DigestExtension(self._config.digest_interval_s, self._residency.digest())
        return self._message(digest_topic(self._epoch), self.last_seq, (), extension)

    def _file(self, num_events: int) -> None:
        """Move the oldest events into the residency; the lock is held, so that they stay in order."""
        queue, residency = self._queue, self._residency
        for _ in range(min(num_events, len(queue))):
            residency.apply(queue.popleft())

    def _number(self, changes: Sequence[KVEvent]) -> list[StreamMessage]:
        messages = []
        for events in split(changes, MAX_BATCH_BLOCKS):
            message = self._message(self._topic, self._next_seq, events)
            self._next_seq += 1
            self._keep(message)
            messages.append(message)
        return messages

    def _keep(self, message: StreamMessage) -> None:
        self._ring.append(message)
        self._ring_bytes += len(message.payload)
        while len(self._ring) > self._config.replay_batches or self._ring_bytes > self._config.replay_bytes:
            self._ring_bytes -= len(self._ring.popleft().payload)

    def _parts(self, tiers: Sequence[Parents], as_of: int) -> Iterator[StreamMessage]:
        topic = snapshot_topic(self._epoch)
        num_parts = max(1, sum(-(-len(blocks) // MAX_BATCH_BLOCKS) for blocks in tiers))
        number = 0
        for tier in Tier:
            items = iter(tiers[tier].items())
            while piece := dict(islice(items, MAX_BATCH_BLOCKS)):
                extension = SnapshotExtension(number, number == num_parts - 1)
                yield self._message(topic, as_of, runs(piece, tier), extension)
                number += 1
        if not number:
            yield self._message(topic, as_of, (), SnapshotExtension(0, is_last=True))

    def _message(
        self, topic: bytes, seq: int, events: Sequence[KVEvent], extension: Extension | None = None
    ) -> StreamMessage:
        ts = self._clock.wall_ns() / _NS_PER_S
        return StreamMessage(topic, seq, encode_batch(ts, events, self._block_size, extension))
