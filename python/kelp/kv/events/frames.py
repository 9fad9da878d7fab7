"""Topics, sequence numbers and requests of the event sockets; what stands in which frame is told in the package."""

from __future__ import annotations

from kelp.core.errors import ProtocolError

SNAPSHOT_REQUEST = b"KELPSNP1"
"""Asks the ROUTER for a snapshot; to vLLM's publisher a sequence number that never comes."""
CURVE_PURPOSE = "kv events"
"""What keys of these sockets are derived for."""
END_SEQ = -1
_SEQ_BYTES = 8
_EVENTS = b"kelp-kv/"
_DIGEST = b"kelp-digest/"
_SNAPSHOT = b"kelp-snapshot/"


def events_topic(epoch: str) -> bytes:
    """Topic of an incarnation's events."""
    return _EVENTS + epoch.encode()


def digest_topic(epoch: str) -> bytes:
    """Topic of its digests."""
    return _DIGEST + epoch.encode()


def snapshot_topic(epoch: str) -> bytes:
    """Topic of the parts of its snapshots."""
    return _SNAPSHOT + epoch.encode()


def is_own_topic(topic: bytes) -> bool:
    """Whether a kelp worker sent this, of whatever incarnation."""
    return topic.startswith((_EVENTS, _DIGEST, _SNAPSHOT))


def encode_seq(seq: int) -> bytes:
    """The frame of a sequence number, `END_SEQ` included."""
    return seq.to_bytes(_SEQ_BYTES, "big", signed=True)


def decode_seq(frame: bytes) -> int:
    """The number, or `END_SEQ`.

    Raises:
        ProtocolError: It is not 8 bytes, or negative.
    """
    if len(frame) != _SEQ_BYTES:
        raise ProtocolError(f"KV event message: sequence number of {len(frame)} bytes, {_SEQ_BYTES} are required")
    seq = int.from_bytes(frame, "big", signed=True)
    if seq < END_SEQ:
        raise ProtocolError(f"KV event message: sequence number {seq} is negative")
    return seq
