"""Whatever a stranger says before it is known: a refusal by name, and nothing is believed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kelp.core.errors import PeerRefused
from kelp.core.peer_auth import SEAL, TAG_BYTES, PeerToken, seal, unseal
from kelp.core.peer_handshake import Initiator, Responder

TOKEN = PeerToken(b"t" * 16)
NAMES = ("direct", "worker", "epoch", "host:1")
_heads = st.sampled_from([b"", SEAL, b"\xc1KELPHS1", b"\xc1KELPHS2", b"\xc1KELPHS3"])
_raw = st.builds(bytes.__add__, _heads, st.one_of(st.binary(max_size=128), st.binary(min_size=32, max_size=32)))


@given(st.lists(_raw, max_size=4))
def test_a_responder_that_is_told_anything_never_takes_a_stranger_for_a_peer(said: list[bytes]) -> None:
    responder = Responder(TOKEN, NAMES, "peer")
    try:
        for raw in said:
            assert len(responder.take(raw)) <= 128
    except PeerRefused:
        pass
    assert not responder.is_done


@given(_raw)
def test_an_initiator_proves_nothing_to_a_stranger(raw: bytes) -> None:
    initiator = Initiator(TOKEN, NAMES, "peer")
    try:
        initiator.prove(raw)
    except PeerRefused:
        return
    raise AssertionError("a stranger was believed")


@given(_raw, st.binary(max_size=8))
def test_no_bytes_open_as_a_sealed_document(raw: bytes, beside: bytes) -> None:
    try:
        unseal(TOKEN, "p", NAMES, raw, beside)
    except PeerRefused:
        return
    raise AssertionError("a stranger was believed")


@given(st.binary(max_size=200), st.integers(0, 10_000), st.integers(1, 255))
def test_a_sealed_document_in_which_anything_was_changed_is_refused(body: bytes, at: int, by: int) -> None:
    sealed = bytearray(seal(TOKEN, "p", NAMES, body))
    assert len(sealed) == len(SEAL) + TAG_BYTES + len(body)
    sealed[at % len(sealed)] ^= by
    try:
        unseal(TOKEN, "p", NAMES, bytes(sealed))
    except PeerRefused:
        return
    raise AssertionError("a changed document was believed")
