"""Answers through Triton prove that they are the worker's own, whole, and in their order."""

from __future__ import annotations

import pytest

from kelp.core.answer_seal import AnswerSeal
from kelp.core.errors import PeerRefused
from kelp.core.peer_auth import WORKER_COMMAND_PROOF, PeerToken, seal

TOKEN, OTHER = PeerToken(b"t" * 16), PeerToken(b"o" * 16)
SCOPE = ("host:1/decode", "epoch")
COMMAND = seal(TOKEN, WORKER_COMMAND_PROOF, SCOPE, b"{}", b"prompt")


def ends(known: PeerToken | None = TOKEN, scope: tuple[str, ...] = SCOPE, command: bytes = COMMAND) -> AnswerSeal:
    return AnswerSeal(known, scope, command)


def test_answers_are_opened_in_the_order_in_which_they_were_sealed() -> None:
    worker, router = ends(), ends()
    for event, ids in ((b"", b"1"), (b"progress", b"23"), (b"finished", b"")):
        assert router.open(worker.seal(event, ids, b"log"), ids, b"log") == event


@pytest.mark.parametrize(
    "worker",
    [
        ends(OTHER),
        ends(scope=("host:1/decode", "an earlier epoch")),
        ends(scope=("host:2/decode", "epoch")),
        ends(command=seal(TOKEN, WORKER_COMMAND_PROOF, SCOPE, b"{}", b"another prompt")),
        ends(None),
    ],
    ids=["another token", "another incarnation", "another worker", "another command", "no token"],
)
def test_what_somebody_else_says_is_refused(worker: AnswerSeal) -> None:
    with pytest.raises(PeerRefused, match="worker answer"):
        ends().open(worker.seal(b"finished", b"1"), b"1")


def test_an_answer_that_was_changed_repeated_or_left_out_is_refused() -> None:
    worker = ends()
    first, second = worker.seal(b"", b"12", b"3"), worker.seal(b"", b"12", b"3")
    for raw, beside in ((first, (b"1", b"23")), (first, (b"12", b"4")), (first + b"x", (b"12", b"3")), (b"", ())):
        with pytest.raises(PeerRefused):
            ends().open(raw, *beside)
    with pytest.raises(PeerRefused):
        ends().open(second, b"12", b"3")
    router = ends()
    router.open(first, b"12", b"3")
    with pytest.raises(PeerRefused):
        router.open(first, b"12", b"3")


def test_without_a_token_answers_travel_as_they_are() -> None:
    assert ends(None).seal(b"event", b"1") == b"event" == ends(None).open(b"event", b"1")
