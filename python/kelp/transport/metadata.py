"""The envelope around an agent's connection metadata.

Transport kind, agent name and a digest come first, so that damaged, foreign or repeated metadata is refused
before the transport's own parser sees it: NIXL keeps what it could parse of a broken document, and from then on
refuses the true agent of that name. The digest finds damage; it does not authenticate.
"""

from __future__ import annotations

import hashlib

from kelp.core.errors import ProtocolError

_DIGEST_BYTES = 16
_MAX_NAME_BYTES = 300


def pack_metadata(kind: str, agent_name: str, connection: bytes) -> bytes:
    """Envelope of `connection`, the transport's own metadata of agent `agent_name`."""
    body = agent_name.encode() + b"\0" + connection
    return _header(kind) + _digest(body) + body


def unpack_metadata(kind: str, metadata: bytes) -> tuple[str, bytes]:
    """Agent name and connection metadata.

    Raises:
        ProtocolError: Another transport, or damaged.
    """
    header = _header(kind)
    if not metadata.startswith(header):
        raise ProtocolError(f"connect: the metadata is not of format {header.decode()!r}")
    digest, body = metadata[len(header) :][:_DIGEST_BYTES], metadata[len(header) + _DIGEST_BYTES :]
    name, separator, connection = body.partition(b"\0")
    if digest != _digest(body) or not separator:
        raise ProtocolError("connect: the metadata is damaged")
    if not 0 < len(name) <= _MAX_NAME_BYTES or not name.isascii():
        raise ProtocolError(f"connect: the agent name in the metadata has {len(name)} bytes or is not ASCII")
    return name.decode(), connection


def _header(kind: str) -> bytes:
    return f"kelp-{kind}/1 ".encode()


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()
