"""Keeps ZMQ sockets to those who know the deployment's token: CURVE, with keys that are derived from it.

The listening side's key pair comes from the token (X25519; one for each kind of socket). CURVE never sends its public
half, so that only who knows the token can open a connection, and only who knows it can answer one. What passes is
encrypted. Clients take a new key pair each time. Also serves the sockets between routers.
"""

from __future__ import annotations

from typing import Any

import zmq
from zmq.utils import z85

from kelp.core.peer_auth import PeerToken

OVERHEAD_BYTES = 64
"""More than a message gains on the wire; size limits have to let it pass."""
_HANDSHAKE_MS = 5000


def listen_to_known(listening: zmq.Socket[Any], token: PeerToken | None, purpose: str) -> None:
    """Before `bind`: only who knows the token may connect; without one, everybody may."""
    listening.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    if token is not None:
        public, secret = _listening_pair(token, purpose)
        listening.setsockopt(zmq.CURVE_SERVER, 1)
        listening.setsockopt(zmq.CURVE_PUBLICKEY, public)
        listening.setsockopt(zmq.CURVE_SECRETKEY, secret)


def connect_to_known(connecting: zmq.Socket[Any], token: PeerToken | None, purpose: str) -> None:
    """Before `connect`: only who knows the token can be at the other end; without one, nobody is asked."""
    if token is not None:
        public, secret = zmq.curve_keypair()
        connecting.setsockopt(zmq.CURVE_SERVERKEY, _listening_pair(token, purpose)[0])
        connecting.setsockopt(zmq.CURVE_PUBLICKEY, public)
        connecting.setsockopt(zmq.CURVE_SECRETKEY, secret)


def _listening_pair(token: PeerToken, purpose: str) -> tuple[bytes, bytes]:
    secret = z85.encode(token.key(f"zmq {purpose}"))
    return zmq.curve_public(secret), secret
