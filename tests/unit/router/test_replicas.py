"""What routers know of each other: staleness, bounds and refusals that the property tests do not name."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from kelp.core.errors import ProtocolError
from kelp.router.replicas.loads import OwnLoads, PeerLoads
from kelp.router.replicas.messages import (
    MAX_ENTRIES,
    ActiveLoad,
    Add,
    Deltas,
    Free,
    PrefillDone,
    Renew,
    Snapshot,
    decode,
    encode,
)

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


def test_a_request_that_is_renewed_without_being_known_is_asked_for() -> None:
    own, peers, _ = pair()
    own.add(load("r"))
    peers.receive(own.message(), 0.0)
    peers.lapse(LEASE_S + 1.0)
    own.add(load("s"))
    own.renew()
    peers.receive(own.message(), LEASE_S + 2.0)
    assert (peers.behind(), set(peers.loads("other"))) == (["other"], {"s"})
    assert peers.num_stale(LEASE_S + 2.0) == 1, "not trusted before the snapshot"
    peers.restore(own.snapshot(), LEASE_S + 3.0)
    assert (peers.behind(), set(peers.loads("other"))) == ([], {"r", "s"})
    assert peers.num_stale(LEASE_S + 3.0) == 0


def test_a_snapshot_from_before_the_renewal_does_not_count_as_the_one_asked_for() -> None:
    own, peers, _ = pair()
    peers.receive(own.message(), 0.0)
    before = own.snapshot()
    own.add(load("r"))
    peers.receive(own.message(), 0.0)
    peers.lapse(LEASE_S + 1.0)
    own.renew()
    peers.receive(own.message(), LEASE_S + 2.0)
    peers.restore(before, LEASE_S + 2.0)
    assert peers.behind() == ["other"]


def test_what_one_message_cannot_hold_goes_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kelp.router.replicas.loads.MAX_ENTRIES", 2)
    own, peers, _ = pair()
    for name in "abcde":
        own.add(load(name))
    own.renew()
    messages = []
    while own.has_news:
        messages.append(own.message())
        peers.receive(messages[-1], 1.0)
    assert max(len(message.deltas) for message in messages) == 2
    renewed = [delta.request_ids for message in messages for delta in message.deltas if isinstance(delta, Renew)]
    assert renewed == [("a", "b"), ("c", "d"), ("e",)]
    assert set(peers.loads("other")) == set("abcde")


def _out_of_bounds() -> Iterator[Deltas | Snapshot]:
    long = "x" * 513
    yield Deltas(long, 1, 1, ())
    yield Deltas("", 1, 1, ())
    yield Deltas("o", -1, 1, ())
    yield Deltas("o", 2**63, 1, ())
    yield Deltas("o", 1, 2**63, ())
    yield Deltas("o", 1, 1, (Free("r"),) * (MAX_ENTRIES + 1))
    yield Deltas("o", 1, 1, (Free(long),))
    yield Deltas("o", 1, 1, (PrefillDone(long),))
    yield Deltas("o", 1, 1, (Renew(("r",) * (MAX_ENTRIES + 1)),))
    yield Snapshot("o", 1, 1, (load("r"),) * (MAX_ENTRIES + 1))
    for bad in (
        ActiveLoad(long, ("w", "1")),
        ActiveLoad("r", ("w", long)),
        ActiveLoad("r", ("w", "1"), ("", "1")),
        ActiveLoad("r", ("w", "1"), None, 2**31),
        ActiveLoad("r", ("w", "1"), None, -1),
        ActiveLoad("r", ("w", "1"), work=(math.nan, 0.0, 0.0, 0.0, 0.0)),
        ActiveLoad("r", ("w", "1"), work=(0.0, math.inf, 0.0, 0.0, 0.0)),
        ActiveLoad("r", ("w", "1"), work=(0.0, 0.0, -1.0, 0.0, 0.0)),
    ):
        yield Deltas("o", 1, 1, (Add(bad),))


@pytest.mark.parametrize("message", list(_out_of_bounds()))
def test_every_field_of_a_peers_message_has_a_bound(message: Deltas | Snapshot) -> None:
    with pytest.raises(ProtocolError, match="of another router"):
        decode(type(message), encode(message))


BAD_TEXT = encode(OwnLoads("abc", 1).message()).replace(b"abc", b"a\xffc")


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\x80", BAD_TEXT, encode(OwnLoads("x", 1).snapshot())[:-1]])
def test_what_is_no_message_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="Deltas of another router"):
        decode(Deltas, raw)
