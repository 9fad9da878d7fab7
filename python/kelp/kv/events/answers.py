"""Answers to subscribers that missed something: replays and snapshots, a message at a time.

Whoever reaches the port may ask, as often as he likes, so asking must be cheap for the worker. A subscriber that does
not read must not hold up the others or the live events: nothing here waits, what cannot be sent now is tried again
later, and given up after a while. All who ask for a snapshot at about the same time get the same one, encoded once;
each connection has one answer at a time and a snapshot now and then, and all of them together so many bytes a second.
What exceeds that waits, and is dropped when its sender has lost patience. He then asks anew.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import zmq

from kelp.core.clock import Clock
from kelp.core.errors import ProtocolError
from kelp.kv.events.frames import END_SEQ, SNAPSHOT_REQUEST, decode_seq, encode_seq
from kelp.kv.events.stream import EventStream, StreamMessage

_MAX_ANSWERS = 64
_MAX_WAITING = 1024
_MAX_WAITING_OF_ONE = 4
_REQUESTS_PER_TURN = 256
_MESSAGES_PER_TURN = 16
_BYTES_PER_S = 128 * 1024 * 1024
_BURST_BYTES = 4 * 1024 * 1024
_SHARED_S = 0.25
"""A snapshot this old is still given to whoever asks; live events and replays add what came since."""
_SNAPSHOT_INTERVAL_S = 1.0
_MAX_SNAPSHOT_BYTES = 64 * 1024 * 1024
"""While those under way take more, nobody gets a newer one."""
_END = [b"", encode_seq(END_SEQ), b""]
_log = logging.getLogger(__name__)


class _Request(NamedTuple):
    """`start_seq` None: asks for a snapshot."""

    address: bytes
    start_seq: int | None
    deadline_s: float


class _Snapshot:
    """One snapshot for many readers, encoded as far as the fastest of them has come."""

    def __init__(self, as_of: int, made_s: float, parts: Iterator[StreamMessage]) -> None:
        self.as_of = as_of
        self.made_s = made_s
        self.num_bytes = 0
        self._parts = parts
        self._encoded: list[list[bytes]] = []

    def frames(self) -> Iterator[list[bytes]]:
        """All parts, for one more reader."""
        number = 0
        while number < len(self._encoded) or self._encode_one():
            yield self._encoded[number]
            number += 1

    def _encode_one(self) -> bool:
        part = next(self._parts, None)
        if part is not None:
            self._encoded.append(part.frames())
            self.num_bytes += len(part.payload)
        return part is not None


@dataclass(slots=True)
class _Answer:
    address: bytes
    messages: Iterator[list[bytes]]
    deadline_s: float
    snapshot: _Snapshot | None = None
    unsent: list[bytes] | None = None


class AnswerDesk:
    """Serves one ROUTER socket; belongs to the publishing thread.

    Args:
        socket: With `ROUTER_MANDATORY`, so that a full or gone peer is an error and not a silent loss.
        stream: What is asked about.
        publish: Sends what the stream has numbered to all subscribers.
        patience_s: How long a request may wait, and a peer may take nothing, before it is given up.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        stream: EventStream,
        publish: Callable[[list[StreamMessage]], None],
        clock: Clock,
        patience_s: float,
    ) -> None:
        self._socket = socket
        self._stream = stream
        self._publish = publish
        self._clock = clock
        self._patience_s = patience_s
        self._waiting: deque[_Request] = deque()
        self._num_waiting: Counter[bytes] = Counter()
        self._answers: deque[_Answer] = deque()
        self._answered: set[bytes] = set()
        self._latest: _Snapshot | None = None
        self._snapshot_s: dict[bytes, float] = {}
        self._budget_bytes = float(_BURST_BYTES)
        self._budget_s = clock.monotonic_s()
        self._num_refused = 0

    @property
    def is_idle(self) -> bool:
        """Whether no answer waits to be sent."""
        return not self._answers and not self._waiting

    def receive(self) -> None:
        """Take the requests that have come, as far as they can wait here; the rest is dropped."""
        now_s = self._clock.monotonic_s()
        for _ in range(_REQUESTS_PER_TURN):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._file(_parse(frames, now_s + self._patience_s))
            except ProtocolError as error:
                self._refuse(error.text)

    def send(self) -> None:
        """Send to each waiting subscriber what it takes now, in turns of a few messages, within the budget."""
        now_s = self._clock.monotonic_s()
        self._budget_bytes = min(_BURST_BYTES, self._budget_bytes + (now_s - self._budget_s) * _BYTES_PER_S)
        self._budget_s = now_s
        self._begin(now_s)
        for _ in range(len(self._answers)):
            if self._budget_bytes <= 0:
                return
            answer = self._answers.popleft()
            if self._send_some(answer):
                self._answers.append(answer)
            else:
                self._answered.discard(answer.address)

    def _file(self, request: _Request) -> None:
        is_full = len(self._waiting) >= _MAX_WAITING
        if is_full or self._num_waiting[request.address] >= _MAX_WAITING_OF_ONE:
            self._refuse("too many wait" if is_full else "too many of one connection wait")
            return
        self._num_waiting[request.address] += 1
        self._waiting.append(request)

    def _refuse(self, reason: str) -> None:
        """Say so now and then: whoever floods the port must not flood the log."""
        self._num_refused += 1
        if self._num_refused & (self._num_refused - 1) == 0:
            _log.warning("request for KV events refused, %d so far: %s", self._num_refused, reason)

    def _begin(self, now_s: float) -> None:
        """Turn requests into answers, in order of arrival among those that may have one now."""
        for _ in range(len(self._waiting)):
            request = self._waiting.popleft()
            if request.deadline_s > now_s and not self._may_begin(request, now_s):
                self._waiting.append(request)
                continue
            self._num_waiting[request.address] -= 1
            if not self._num_waiting[request.address]:
                del self._num_waiting[request.address]
            if request.deadline_s > now_s:
                self._answers.append(self._answer(request, now_s))
                self._answered.add(request.address)

    def _may_begin(self, request: _Request, now_s: float) -> bool:
        if len(self._answers) >= _MAX_ANSWERS or request.address in self._answered:
            return False
        if request.start_seq is not None:
            return True
        return now_s - self._snapshot_s.get(request.address, -_SNAPSHOT_INTERVAL_S) >= _SNAPSHOT_INTERVAL_S

    def _answer(self, request: _Request, now_s: float) -> _Answer:
        deadline_s = now_s + self._patience_s
        if request.start_seq is not None:
            messages = (message.frames() for message in self._stream.replay(request.start_seq))
            return _Answer(request.address, messages, deadline_s)
        self._note_snapshot(request.address, now_s)
        snapshot = self._snapshot(now_s)
        return _Answer(request.address, snapshot.frames(), deadline_s, snapshot)

    def _note_snapshot(self, address: bytes, now_s: float) -> None:
        self._snapshot_s.pop(address, None)
        self._snapshot_s[address] = now_s
        while now_s - next(iter(self._snapshot_s.values())) >= _SNAPSHOT_INTERVAL_S:
            del self._snapshot_s[next(iter(self._snapshot_s))]

    def _snapshot(self, now_s: float) -> _Snapshot:
        self._publish(self._stream.flush())
        latest = self._latest
        if latest is not None and (
            latest.as_of == self._stream.last_seq or now_s - latest.made_s < _SHARED_S or self._is_full()
        ):
            return latest
        changes, parts = self._stream.snapshot()
        self._publish(changes)
        self._latest = _Snapshot(self._stream.last_seq, now_s, parts)
        return self._latest

    def _is_full(self) -> bool:
        under_way: Iterable[_Snapshot] = {answer.snapshot for answer in self._answers if answer.snapshot is not None}
        return sum(snapshot.num_bytes for snapshot in under_way) > _MAX_SNAPSHOT_BYTES

    def _send_some(self, answer: _Answer) -> bool:
        """Whether there is more to send."""
        for _ in range(_MESSAGES_PER_TURN):
            frames = answer.unsent if answer.unsent is not None else next(answer.messages, _END)
            try:
                self._socket.send_multipart([answer.address, b"", *frames], zmq.NOBLOCK)
            except zmq.Again:
                answer.unsent = frames
                return self._clock.monotonic_s() < answer.deadline_s
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                return False
            if frames is _END:
                return False
            answer.unsent = None
            answer.deadline_s = self._clock.monotonic_s() + self._patience_s
            self._budget_bytes -= len(frames[-1])
            if self._budget_bytes <= 0:
                break
        return True


def _parse(frames: list[bytes], deadline_s: float) -> _Request:
    if len(frames) != 3 or frames[1]:
        raise ProtocolError(f"{len(frames)} frames; an empty one and a sequence number are required")
    address, _, request = frames
    return _Request(address, None if request == SNAPSHOT_REQUEST else decode_seq(request), deadline_s)
