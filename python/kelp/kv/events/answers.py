"""Answers to subscribers that missed something: replays and snapshots, a message at a time.

A subscriber that does not read must not hold up the others or the live events, so nothing here waits: what cannot be
sent now is tried again later, and given up after a while. The subscriber then asks anew.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zmq

from kelp.core.clock import Clock
from kelp.core.errors import ProtocolError
from kelp.kv.events.frames import END_SEQ, SNAPSHOT_REQUEST, decode_seq, encode_seq
from kelp.kv.events.stream import StreamMessage

_MAX_ANSWERS = 64
_MESSAGES_PER_TURN = 16
_END = [b"", encode_seq(END_SEQ), b""]
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Answer:
    address: bytes
    messages: Iterator[list[bytes]]
    deadline_s: float
    unsent: list[bytes] | None = None


class AnswerDesk:
    """Serves one ROUTER socket; belongs to the publishing thread.

    Args:
        socket: With `ROUTER_MANDATORY`, so that a full or gone peer is an error and not a silent loss.
        replay: Batches from a sequence number on.
        snapshot: Parts of a snapshot; called when its turn comes.
        patience_s: How long a peer may take nothing before its answer is given up.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        replay: Callable[[int], Iterator[StreamMessage]],
        snapshot: Callable[[], Iterator[StreamMessage]],
        clock: Clock,
        patience_s: float,
    ) -> None:
        self._socket = socket
        self._replay = replay
        self._snapshot = snapshot
        self._clock = clock
        self._patience_s = patience_s
        self._answers: deque[_Answer] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether no answer waits to be sent."""
        return not self._answers

    def receive(self) -> None:
        """Take the requests that have come; too many at once are left to their senders' patience."""
        while len(self._answers) < _MAX_ANSWERS:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._accept(frames)
            except ProtocolError as error:
                _log.warning("request for KV events refused: %s", error.text)

    def send(self) -> None:
        """Send to each waiting subscriber what it takes now, in turns of a few messages."""
        for _ in range(len(self._answers)):
            answer = self._answers.popleft()
            if self._send_some(answer):
                self._answers.append(answer)

    def _accept(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or frames[1]:
            raise ProtocolError(f"{len(frames)} frames; an empty one and a sequence number are required")
        address, _, request = frames
        if request == SNAPSHOT_REQUEST:
            messages = self._snapshot_frames()
        else:
            start_seq = decode_seq(request)
            messages = (message.frames() for message in self._replay(start_seq))
        self._answers.append(_Answer(address, messages, self._clock.monotonic_s() + self._patience_s))

    def _snapshot_frames(self) -> Iterator[list[bytes]]:
        for message in self._snapshot():
            yield message.frames()

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
        return True
