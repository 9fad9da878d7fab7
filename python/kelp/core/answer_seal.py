"""Proof that each answer to a sealed command comes from the worker that it was for, unchanged and in its place.

For answers through Triton, whose port somebody else may have taken after a death, or whoever stands between. A worker's
own socket proves itself when the connection begins (`core.peer_handshake`).
"""

from __future__ import annotations

from typing import Final

from kelp.core.peer_auth import PeerToken, proof_in, seal, unseal

_PURPOSE: Final = "worker answer"
_COUNT_BYTES: Final = 8


class AnswerSeal:
    """One end of one request's answers; `seal` at the worker, `open` at the router, once for each answer, in order.

    Args:
        token: What both know; None: answers travel as they are.
        scope: Names the incarnation of the worker.
        command: As it was sent, sealed.
    """

    def __init__(self, token: PeerToken | None, scope: tuple[str, ...], command: bytes) -> None:
        self._token = token
        self._scope = scope
        self._proof = proof_in(command)
        self._count = 0

    def seal(self, event: bytes, *beside: bytes) -> bytes:
        """What goes for `event`, which may be empty; `beside` is proven, too, and travels by another way."""
        return seal(self._token, _PURPOSE, self._scope, event, self._beside(beside))

    def open(self, raw: bytes, *beside: bytes) -> bytes:
        """The event in what `seal` made of the answer of the same number.

        Raises:
            PeerRefused: It is somebody else's, has been changed, or is out of place.
        """
        return unseal(self._token, _PURPOSE, self._scope, raw, self._beside(beside))

    def _beside(self, parts: tuple[bytes, ...]) -> bytes:
        """All that is proven beside the event, so that no part can pass for another."""
        if self._token is None:
            return b""
        number, self._count = self._count, self._count + 1
        lengths = b"".join(len(part).to_bytes(_COUNT_BYTES, "little") for part in parts)
        return b"".join((self._proof, number.to_bytes(_COUNT_BYTES, "little"), lengths, *parts))
