"""How the two ends of a connection show each other that they know the same token, before anything else is read.

    initiator -> responder   nonce
    responder -> initiator   nonce, tag over both nonces: it knows the token, and answers this connection
    initiator -> responder   tag over both nonces: so does the initiator

Tags name their maker's side and the responder's names, so none can be reflected, repeated or passed on to another
address. Messages have a fixed length; whoever carries them bounds time and number. What follows on the connection is
neither encrypted nor proven (docs/security.md).
"""

from __future__ import annotations

import secrets

from kelp.core.errors import PeerRefused
from kelp.core.peer_auth import TAG_BYTES, PeerToken

NONCE_BYTES = 32
_OPENING = b"\xc1KELPHS1"
_CHALLENGE = b"\xc1KELPHS2"
_PROOF = b"\xc1KELPHS3"
_PURPOSE = "handshake"
_INITIATOR, _RESPONDER = b"initiator", b"responder"


def _fields(raw: bytes, kind: bytes, num_bytes: int, what: str) -> bytes:
    if len(raw) != len(kind) + num_bytes or not raw.startswith(kind):
        raise PeerRefused(f"{what}: it does not ask for, or does not show, the token of peers.token_file")
    return raw[len(kind) :]


class _Side:
    def __init__(self, token: PeerToken, names: tuple[str, ...], what: str) -> None:
        self._token = token
        self._scope = [name.encode() for name in names]
        self._what = what
        self._nonce = secrets.token_bytes(NONCE_BYTES)

    def _tag(self, side: bytes, *nonces: bytes) -> bytes:
        return self._token.tag(_PURPOSE, side, *self._scope, *nonces)

    def _check(self, tag: bytes, side: bytes, *nonces: bytes) -> None:
        if not self._token.is_tag(tag, _PURPOSE, side, *self._scope, *nonces):
            raise PeerRefused(f"{self._what}: it has another token (peers.token_file), or another name")


class Initiator(_Side):
    """The end that connects.

    Args:
        names: Protocol, role, epoch and endpoint of the responder, as the initiator knows them.
        what: Names the responder in errors.
    """

    @property
    def opening(self) -> bytes:
        """To be sent first."""
        return _OPENING + self._nonce

    def prove(self, challenge: bytes) -> bytes:
        """The answer to what the responder said; after it, both are known to each other.

        Raises:
            PeerRefused: The responder does not know the token, or is another one.
        """
        fields = _fields(challenge, _CHALLENGE, NONCE_BYTES + TAG_BYTES, self._what)
        nonce, tag = fields[:NONCE_BYTES], fields[NONCE_BYTES:]
        self._check(tag, _RESPONDER, self._nonce, nonce)
        return _PROOF + self._tag(_INITIATOR, self._nonce, nonce)


class Responder(_Side):
    """The end that listens; for one connection.

    Args:
        names: See `Initiator`; as the responder knows itself.
        what: Names the initiator in errors.

    Attributes:
        is_done: The initiator is known.
    """

    def __init__(self, token: PeerToken, names: tuple[str, ...], what: str) -> None:
        super().__init__(token, names, what)
        self._theirs = b""
        self.is_done = False

    def take(self, raw: bytes) -> bytes:
        """Take a message; what is to be sent back, empty at the end.

        Raises:
            PeerRefused: The initiator does not know the token, or means another one.
        """
        assert not self.is_done
        if not self._theirs:
            self._theirs = _fields(raw, _OPENING, NONCE_BYTES, self._what)
            return _CHALLENGE + self._nonce + self._tag(_RESPONDER, self._theirs, self._nonce)
        self._check(_fields(raw, _PROOF, TAG_BYTES, self._what), _INITIATOR, self._theirs, self._nonce)
        self.is_done = True
        return b""
