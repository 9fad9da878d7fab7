"""What both ends of a direct channel do to their socket, and how its address is written."""

from __future__ import annotations

import asyncio
import socket

from kelp.core.errors import ProtocolError

_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 20_000))
"""A host that has gone without a word is noticed within half a minute; the last is in milliseconds."""


def configure(transport: asyncio.Transport) -> None:
    """Send at once, and notice a peer that has silently gone."""
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        option = getattr(socket, name, None)
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def format_endpoint(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Inverse of `format_endpoint`.

    Raises:
        ProtocolError: It is no `host:port`.
    """
    host, _, port = endpoint.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ProtocolError(f"direct_endpoint: {endpoint!r} given, host:port expected")
    return host, int(port)
