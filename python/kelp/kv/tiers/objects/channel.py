"""Messages over a stream socket: a length, then that many bytes; every wait has an end."""

from __future__ import annotations

import socket
import struct
import time

_LENGTH = struct.Struct("<I")
_MAX_BYTES = 64 * 1024 * 1024


class Channel:
    """One end; one thread uses it at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: bytes, timeout_s: float | None = None) -> None:
        """Send one message.

        Raises:
            TimeoutError: The other end takes nothing.
            OSError: It is gone.
        """
        self._socket.settimeout(timeout_s)
        self._socket.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self, timeout_s: float | None = None) -> bytes:
        """Wait for one message.

        Raises:
            TimeoutError: It did not come in time, or not whole; the channel is of no use any more.
            OSError: The other end is gone, or sends what is no message.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        (num_bytes,) = _LENGTH.unpack(self._exactly(_LENGTH.size, deadline_s))
        if num_bytes > _MAX_BYTES:
            raise OSError(f"a message of {num_bytes} bytes")
        return self._exactly(num_bytes, deadline_s)

    def _exactly(self, num_bytes: int, deadline_s: float | None) -> bytes:
        received = bytearray()
        while len(received) < num_bytes:
            remaining_s = None if deadline_s is None else deadline_s - time.monotonic()
            if remaining_s is not None and remaining_s <= 0:
                raise TimeoutError("no message came in time")
            self._socket.settimeout(remaining_s)
            part = self._socket.recv(num_bytes - len(received))
            if not part:
                raise ConnectionError("the other end is gone")
            received += part
        return bytes(received)

    def close(self) -> None:
        """Close this end."""
        self._socket.close()
