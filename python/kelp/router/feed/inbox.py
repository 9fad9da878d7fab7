"""Reads the frames of one worker for its subscription: live ones and answers, kelp's and foreign engines'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kelp.core.errors import ProtocolError
from kelp.kv.events.codec import DigestExtension, SnapshotExtension, decode_foreign, decode_own
from kelp.kv.events.frames import END_SEQ, decode_seq, digest_topic, events_topic, is_own_topic, snapshot_topic
from kelp.router.feed.subscription import Subscription
from kelp.router.feed.values import Action, Batch

_NEVER_S = float("-inf")


class EventInbox:
    """Frames in, actions out. A malformed message is counted and never raised: the sender is at fault, not the caller.

    Attributes:
        num_refused: Messages that were not read, by reason.
    """

    def __init__(self, epoch: str, subscription: Subscription, max_bytes: int) -> None:
        self.num_refused: Counter[str] = Counter()
        self._subscription = subscription
        self._max_bytes = max_bytes
        self._events = events_topic(epoch)
        self._digest = digest_topic(epoch)
        self._snapshot = snapshot_topic(epoch)

    def on_live(self, frames: Sequence[bytes], now_s: float) -> list[Action]:
        """A message of the PUB socket: topic, sequence number, payload."""
        try:
            topic, seq, payload = _three(frames)
            if topic == self._digest:
                return self._on_digest(seq, payload, now_s)
        except ProtocolError:
            return self._refuse("malformed")
        if not self._is_mine(topic):
            return self._refuse("epoch")
        return self._subscription.on_batch(self._batch(topic, seq, payload), now_s)

    def on_answer(self, attempt: int, frames: Sequence[bytes], now_s: float) -> list[Action]:
        """A message of the ROUTER socket: an empty one, topic, sequence number, payload."""
        try:
            if not frames or frames[0]:
                raise ProtocolError("KV event answer: the first frame must be empty")
            topic, seq, payload = _three(frames[1:])
            if seq == END_SEQ:
                return self._subscription.on_end(attempt, now_s)
            if topic == self._snapshot:
                return self._on_part(attempt, seq, payload, now_s)
        except ProtocolError:
            self._refuse("malformed")
            return self._subscription.on_failed(attempt, now_s)
        if not self._is_mine(topic):
            self._refuse("epoch")
            return self._subscription.on_failed(attempt, now_s)
        return self._subscription.on_replayed(attempt, self._batch(topic, seq, payload), now_s)

    def _is_mine(self, topic: bytes) -> bool:
        return topic == self._events or not is_own_topic(topic)

    def _batch(self, topic: bytes, seq: int, payload: bytes) -> Batch:
        is_foreign = topic != self._events
        try:
            if is_foreign:
                foreign = decode_foreign(payload, self._max_bytes)
                return Batch(seq, foreign.ts, foreign.events, is_foreign)
            own = decode_own(payload, self._max_bytes)
            return Batch(seq, own.ts, own.events, is_foreign)
        except ProtocolError:
            self._refuse("malformed")
            return Batch(seq, _NEVER_S, None, is_foreign)

    def _on_digest(self, seq: int, payload: bytes, now_s: float) -> list[Action]:
        extension = decode_own(payload, self._max_bytes).extension
        if not isinstance(extension, DigestExtension):
            raise ProtocolError("KV event digest: the extension is missing")
        return self._subscription.on_digest(seq, extension.tiers, extension.interval_s, now_s)

    def _on_part(self, attempt: int, seq: int, payload: bytes, now_s: float) -> list[Action]:
        part = decode_own(payload, self._max_bytes)
        if not isinstance(part.extension, SnapshotExtension):
            raise ProtocolError("KV event snapshot: the extension is missing")
        return self._subscription.on_part(attempt, seq, part.extension, part.events, now_s)

    def _refuse(self, reason: str) -> list[Action]:
        self.num_refused[reason] += 1
        return []


def _three(frames: Sequence[bytes]) -> tuple[bytes, int, bytes]:
    if len(frames) != 3:
        raise ProtocolError(f"KV event message: {len(frames)} frames, 3 are required")
    topic, seq, payload = frames
    return topic, decode_seq(seq), payload
