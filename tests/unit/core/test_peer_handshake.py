"""Two ends of a connection: they know the same token, mean each other, and nothing that was said before helps."""

from __future__ import annotations

import pytest

from kelp.core.errors import PeerRefused
from kelp.core.peer_auth import PeerToken
from kelp.core.peer_handshake import Initiator, Responder

TOKEN, OTHER = PeerToken(b"t" * 16), PeerToken(b"o" * 16)
NAMES = ("direct", "worker", "epoch", "host:1")


def initiator(token: PeerToken = TOKEN, names: tuple[str, ...] = NAMES) -> Initiator:
    return Initiator(token, names, "the worker")


def responder(token: PeerToken = TOKEN, names: tuple[str, ...] = NAMES) -> Responder:
    return Responder(token, names, "the router")


def test_two_that_know_the_token_know_each_other_after_three_messages() -> None:
    one, other = initiator(), responder()
    proof = one.prove(other.take(one.opening))
    assert not other.is_done
    assert other.take(proof) == b"" and other.is_done


@pytest.mark.parametrize(
    ("token", "names"),
    [(OTHER, NAMES), *((TOKEN, (*NAMES[:at], "changed", *NAMES[at + 1 :])) for at in range(len(NAMES)))],
    ids=["token", "protocol", "worker", "epoch", "endpoint"],
)
def test_a_responder_that_is_not_the_one_that_is_meant_is_found_out(token: PeerToken, names: tuple[str, ...]) -> None:
    one, other = initiator(), responder(token, names)
    with pytest.raises(PeerRefused, match=r"the worker: .*peers\.token_file"):
        one.prove(other.take(one.opening))


def test_an_initiator_without_the_token_is_found_out() -> None:
    one, other = initiator(), responder()
    other.take(one.opening)
    stranger = initiator(OTHER)
    proof = stranger.prove(responder(OTHER).take(stranger.opening))
    with pytest.raises(PeerRefused, match=r"the router: .*peers\.token_file"):
        other.take(proof)


def test_what_was_said_on_one_connection_proves_nothing_on_another() -> None:
    one, other, next_one = initiator(), responder(), responder()
    proof = one.prove(other.take(one.opening))
    next_one.take(one.opening)
    with pytest.raises(PeerRefused):
        next_one.take(proof)


def test_a_responders_answer_is_no_proof_of_an_initiator() -> None:
    victim, oracle = responder(), responder()
    challenge = victim.take(initiator().opening)
    reflected = oracle.take(initiator().opening[:8] + challenge[8:40])
    with pytest.raises(PeerRefused):
        victim.take(b"\xc1KELPHS3" + reflected[40:])


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xc1KELPHS1", b"x" * 40, initiator().opening + b"x"],
    ids=["nothing", "too short", "another protocol", "too long"],
)
def test_a_message_of_another_form_is_refused(raw: bytes) -> None:
    with pytest.raises(PeerRefused):
        responder().take(raw)
    with pytest.raises(PeerRefused):
        initiator().prove(raw)
