"""Cuts a byte stream into frames: a length of four bytes, little-endian, and as many bytes.

Both ends of the direct channel read with it. Knows nothing of what frames hold; takes memory for what has come, not for
what a peer says will come.
"""

from __future__ import annotations

import struct

from kelp.core.errors import ProtocolError

LENGTH = struct.Struct("<I")


def framed(payload: bytes) -> bytes:
    """With its length in front."""
    return LENGTH.pack(len(payload)) + payload


class FrameReader:
    """One direction of one connection.

    Args:
        what: Names the peer in errors.

    Attributes:
        max_bytes: Longest frame that is taken; may be changed between frames.
    """

    def __init__(self, what: str, max_bytes: int) -> None:
        self._what = what
        self._rest = bytearray()
        self.max_bytes = max_bytes

    @property
    def num_held_bytes(self) -> int:
        """Of a frame that has not come whole."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[bytes]:
        """Whole frames, without their lengths, in order.

        Raises:
            ProtocolError: A frame is empty or too long; nothing after it can be understood.
        """
        if not self._rest:
            frames, end = self._cut(data)
            self._rest += data[end:]
            return frames
        self._rest += data
        frames, end = self._cut(self._rest)
        del self._rest[:end]
        return frames

    def _cut(self, data: bytes | bytearray) -> tuple[list[bytes], int]:
        frames: list[bytes] = []
        at, size = 0, len(data)
        with memoryview(data) as view:
            while size - at >= LENGTH.size:
                (length,) = LENGTH.unpack_from(view, at)
                if not 0 < length <= self.max_bytes:
                    raise ProtocolError(f"{self._what}: frame of {length} bytes, the limit is {self.max_bytes}")
                end = at + LENGTH.size + length
                if end > size:
                    break
                frames.append(bytes(view[at + LENGTH.size : end]))
                at = end
        return frames, at
