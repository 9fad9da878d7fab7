"""One keep-alive HTTP connection that carries one streamed answer at a time.

A socket and a buffer, no HTTP library: the client shares its cores with the server under test, so it must cost far
less. Everything that can wait until an answer has ended is done then.
"""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass

from perf.router.loadgen_protocols import AnswerError, Protocol, events_of

_READ_BYTES = 256 * 1024
_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as its client saw it; times are `time.perf_counter()` values.

    Attributes:
        first_s: When the first generated text was there.
        num_events: SSE events; one may carry several tokens.
        error: Empty if the answer is whole.
    """

    start_s: float
    first_s: float
    end_s: float
    num_input_tokens: int
    num_output_tokens: int
    num_events: int
    error: str = ""


class Connection:
    """Sends requests and collects answers.

    Args:
        is_quick_ack: Acknowledge at once what arrives. Linux otherwise delays acknowledgements by up to 40 ms, for
            which a server that leaves Nagle's algorithm on waits.
    """

    def __init__(self, host: str, port: int, protocol: Protocol, is_quick_ack: bool) -> None:
        self._protocol = protocol
        self._is_quick_ack = is_quick_ack
        self._socket = socket.create_connection((host, port), timeout=10.0)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._body = bytearray()
        self._body_start = 0
        self._start_s = self._first_s = 0.0

    def fileno(self) -> int:
        """For epoll."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def ask(self, request: bytes) -> None:
        """Send a request; the one before has been answered."""
        self._body = bytearray()
        self._body_start = 0
        self._first_s = 0.0
        self._start_s = time.perf_counter()
        self._socket.sendall(request)

    def read(self) -> Answer | None:
        """Take what has arrived; the answer, once it is whole.

        Raises:
            ConnectionError: The server closed the connection.
        """
        data = self._socket.recv(_READ_BYTES)
        now_s = time.perf_counter()
        if self._is_quick_ack:
            # Not sticky: the kernel goes back to delaying by itself.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._body += data
        if not self._body_start:
            self._body_start = self._body.find(_HEAD_END) + len(_HEAD_END)
            if self._body_start < len(_HEAD_END):
                self._body_start = 0
                return None
        if not self._first_s and self._protocol.first_text.search(self._body, self._body_start):
            self._first_s = now_s
        return self._answer(now_s) if self._is_whole() else None

    def failed(self, error: str) -> Answer:
        """The answer to a request that got none."""
        return Answer(self._start_s, 0.0, time.perf_counter(), 0, 0, 0, error)

    def _is_whole(self) -> bool:
        if self._body.endswith(_LAST_CHUNK):
            return True
        if found := _CONTENT_LENGTH.search(self._body, 0, self._body_start):
            return len(self._body) - self._body_start >= int(found.group(1))
        return False

    def _answer(self, now_s: float) -> Answer:
        raw = bytes(self._body)
        head, body = raw[: self._body_start], raw[self._body_start :]
        if head[9:12] != b"200":
            return self.failed(f"{head[:40]!r}: {body[:200]!r}")
        try:
            events = events_of(body)
            counts = self._protocol.counts(events)
        except AnswerError as error:
            return self.failed(str(error))
        if not self._first_s:
            return self.failed("no event has text")
        return Answer(
            start_s=self._start_s,
            first_s=self._first_s,
            end_s=now_s,
            num_input_tokens=counts.num_input_tokens,
            num_output_tokens=counts.num_output_tokens,
            num_events=len(events),
        )
