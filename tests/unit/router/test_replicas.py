"""What routers know of each other: staleness, bounds and refusals that the property tests do not name."""

from __future__ import annotations

import pytest

from kelp.core.errors import ProtocolError
from kelp.router.replicas.loads import OwnLoads, PeerLoads
from kelp.router.replicas.messages import ActiveLoad, Deltas, decode, encode

LEASE_S, STALE_S = 30.0, 3.0


class Sink:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def peer_added(self, peer_id: str, load: ActiveLoad) -> None:
        self.calls.append(f"+{peer_id}")

    def peer_prefilled(self, peer_id: str) -> None:
        self.calls.append(f"={peer_id}")

    def peer_renewed(self, peer_id: str) -> None:
        self.calls.append(f"~{peer_id}")

    def peer_freed(self, peer_id: str) -> None:
        self.calls.append(f"-{peer_id}")


def load(name: str) -> ActiveLoad:
    return ActiveLoad(name, ("w", "1"))


def pair(epoch: int = 1) -> tuple[OwnLoads, PeerLoads, Sink]:
    sink = Sink()
    peers = PeerLoads(sink, LEASE_S, STALE_S)
    peers.set_peers({"other": epoch}, 0.0)
    return OwnLoads("other", epoch), peers, sink


def test_every_step_of_a_request_is_told_once() -> None:
    own, peers, sink = pair()
    own.add(load("r"))
    own.prefilled("r")
    own.prefilled("r")
    own.renew()
    own.free("r")
    own.free("r")
    message = own.message()
    for _ in range(2):
        peers.receive(message, 1.0)
    assert sink.calls == ["+\0other|r", "=\0other|r", "~\0other|r", "-\0other|r"]
    assert not own.has_news


def test_a_router_is_stale_while_it_is_silent_or_messages_are_missing() -> None:
    own, peers, _ = pair()
    assert peers.num_stale(STALE_S + 0.1) == 1
    peers.receive(own.message(), 4.0)
    assert peers.num_stale(4.0 + STALE_S) == 0
    lost = own.message()
    peers.receive(own.message(), 8.0)
    assert (peers.behind(), peers.num_stale(8.0)) == (["other"], 1)
    peers.receive(lost, 8.5)
    assert (peers.behind(), peers.num_stale(8.5)) == ([], 0)


def test_too_many_early_messages_are_dropped_for_a_snapshot() -> None:
    own, peers, _ = pair()
    peers.receive(own.message(), 1.0)
    own.message()
    own.add(load("r"))
    for _ in range(1000):
        peers.receive(own.message(), 1.0)
    assert peers.behind() == ["other"]
    peers.restore(own.snapshot(), 2.0)
    peers.receive(own.message(), 2.0)
    assert (peers.behind(), set(peers.loads("other"))) == ([], {"r"})


def test_an_earlier_incarnation_is_not_listened_to() -> None:
    _, peers, sink = pair(epoch=2)
    earlier = OwnLoads("other", 1)
    earlier.add(load("r"))
    peers.receive(earlier.message(), 1.0)
    peers.restore(earlier.snapshot(), 1.0)
    assert sink.calls == []


def test_a_router_that_nobody_announced_is_not_listened_to() -> None:
    _, peers, sink = pair()
    stranger = OwnLoads("stranger", 1)
    stranger.add(load("r"))
    peers.receive(stranger.message(), 1.0)
    peers.restore(stranger.snapshot(), 1.0)
    assert (sink.calls, peers.loads("stranger")) == ([], {})


def test_a_message_comes_back_as_it_was() -> None:
    own = OwnLoads("other", 1)
    own.add(ActiveLoad("r", ("d", "1"), ("p", "2"), 512, (1.0, 480.0, 1e5, 0.0, 0.0)))
    own.renew()
    message = own.message()
    assert decode(Deltas, encode(message)) == message


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\x80", encode(OwnLoads("x", 1).snapshot())[:-1]])
def test_what_is_no_message_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="Deltas of another router"):
        decode(Deltas, raw)
