"""Who asks a publisher for what he missed is answered, whoever else asks, and at a price that the worker can pay."""

from __future__ import annotations

import logging
from collections import defaultdict, deque

import pytest
import zmq

from kelp.core.clock import FakeClock
from kelp.core.config import EventsConfig
from kelp.core.kv_events import BlocksStored
from kelp.kv.events import answers
from kelp.kv.events.answers import AnswerDesk
from kelp.kv.events.codec import decode_own
from kelp.kv.events.frames import SNAPSHOT_REQUEST, decode_seq, encode_seq
from kelp.kv.events.stream import EventStream, StreamMessage
from support.event_doubles import digest16

PATIENCE_S = 5.0


class Router:
    """The ROUTER socket: what has come, and what each connection was sent."""

    def __init__(self) -> None:
        self.requests: deque[list[bytes]] = deque()
        self.sent: defaultdict[bytes, list[tuple[int, bytes]]] = defaultdict(list)
        self.stuck: set[bytes] = set()
        self.gone: set[bytes] = set()

    def recv_multipart(self, _: int) -> list[bytes]:
        if not self.requests:
            raise zmq.Again
        return self.requests.popleft()

    def send_multipart(self, frames: list[bytes], _: int) -> None:
        address, empty, _topic, seq, payload = frames
        assert empty == b""
        if address in self.stuck:
            raise zmq.Again
        if address in self.gone:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self.sent[address].append((decode_seq(seq), payload))


class Bench:
    def __init__(self, num_blocks: int = 0, **config: object) -> None:
        self.clock = FakeClock()
        self.stream = EventStream("e", 16, EventsConfig.model_validate(config), self.clock)
        self.router = Router()
        self.published: list[StreamMessage] = []
        self.desk = AnswerDesk(
            self.router,  # type: ignore[arg-type]
            self.stream,
            self.published.extend,
            self.clock,
            PATIENCE_S,
        )
        self.store(*range(num_blocks))

    def store(self, *blocks: int) -> None:
        for block in blocks:
            self.stream.put(BlocksStored((digest16(block),), None))

    def ask(self, *addresses: bytes, request: bytes = SNAPSHOT_REQUEST) -> None:
        self.router.requests.extend([address, b"", request] for address in addresses)

    def turn(self, seconds: float = 0.005) -> None:
        self.clock.advance(seconds)
        self.desk.receive()
        self.desk.send()

    def finish(self) -> None:
        self.turn()
        while not self.desk.is_idle:
            self.turn()

    def as_of(self, address: bytes) -> list[int]:
        """Of each snapshot that this connection got to its end."""
        sent, found = [seq for seq, _ in self.router.sent[address]], []
        for before, seq in zip(sent, sent[1:], strict=False):
            if seq == -1:
                found.append(before)
        return found


def names(count: int) -> list[bytes]:
    return [b"peer-%d" % number for number in range(count)]


@pytest.fixture
def num_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every snapshot that is begun."""
    begun: list[int] = []
    real = EventStream.snapshot

    def counted(stream: EventStream) -> object:
        begun.append(stream.last_seq)
        return real(stream)

    monkeypatch.setattr(EventStream, "snapshot", counted)
    return begun


def test_all_who_ask_at_once_get_one_snapshot_that_was_encoded_once(num_encoded: list[int]) -> None:
    bench = Bench(num_blocks=10_000)
    bench.ask(*names(100))
    bench.finish()
    assert len(num_encoded) == 1
    first, *others = (bench.router.sent[name] for name in names(100))
    assert [seq for seq, _ in first] == [2, 2, 2, -1]
    assert all(other == first for other in others)
    held = {block for _, part in first[:-1] for event in decode_own(part, 1 << 22).events for block in event.hashes}  # type: ignore[union-attr]
    assert held == {digest16(block) for block in range(10_000)}


def test_one_who_asks_while_another_is_being_answered_gets_all_of_it(num_encoded: list[int]) -> None:
    bench = Bench(num_blocks=answers._MESSAGES_PER_TURN * 4096 + 1)
    bench.ask(b"early")
    bench.turn()
    assert 0 < len(bench.router.sent[b"early"]) <= answers._MESSAGES_PER_TURN
    bench.ask(b"late")
    bench.finish()
    assert bench.router.sent[b"late"] == bench.router.sent[b"early"]
    assert len(num_encoded) == 1


def test_what_has_not_changed_is_not_encoded_again(num_encoded: list[int]) -> None:
    bench = Bench(num_blocks=10)
    for name in names(3):
        bench.ask(name)
        bench.finish()
        bench.clock.advance(100.0)
    assert len(num_encoded) == 1


def test_what_has_changed_is_told_to_those_who_ask_later_and_is_published_first() -> None:
    bench = Bench(num_blocks=1)
    bench.ask(b"before")
    bench.finish()
    bench.store(1)
    bench.ask(b"soon")
    bench.finish()
    bench.clock.advance(answers._SHARED_S)
    bench.store(2)
    bench.ask(b"later")
    bench.finish()
    assert [bench.as_of(name) for name in (b"before", b"soon", b"later")] == [[0], [0], [2]]
    assert [message.seq for message in bench.published] == [0, 1, 2]


def test_a_connection_gets_a_snapshot_now_and_then_however_often_it_asks() -> None:
    bench = Bench(num_blocks=1)
    bench.ask(*[b"greedy"] * 1000)
    bench.turn()
    bench.ask(b"modest")
    while bench.router.requests:
        bench.turn()
    assert (len(bench.as_of(b"greedy")), len(bench.as_of(b"modest"))) == (1, 1)
    for _ in range(2000):
        bench.turn()
    assert len(bench.as_of(b"greedy")) == answers._MAX_WAITING_OF_ONE + 1
    assert bench.desk.is_idle


def test_answers_take_so_many_bytes_a_second_and_no_more() -> None:
    bench = Bench(num_blocks=50_000)
    bench.ask(*names(60))
    bench.turn(0.0)
    part_bytes = max(len(part) for parts in bench.router.sent.values() for _, part in parts)
    sent_bytes = [_num_bytes(bench)]
    for _ in range(4):
        bench.turn(0.01)
        sent_bytes.append(_num_bytes(bench))
    assert sent_bytes[0] <= answers._BURST_BYTES + part_bytes
    for before, after in zip(sent_bytes, sent_bytes[1:], strict=False):
        assert 0 < after - before <= 0.01 * answers._BYTES_PER_S + 2 * part_bytes
    bench.finish()
    assert all(len(bench.as_of(name)) == 1 for name in names(60))


def _num_bytes(bench: Bench) -> int:
    return sum(len(part) for parts in bench.router.sent.values() for _, part in parts)


def test_a_peer_that_takes_nothing_is_given_up_and_holds_up_nobody() -> None:
    bench = Bench(num_blocks=1)
    bench.router.stuck |= set(names(answers._MAX_ANSWERS - 1))
    bench.ask(*names(answers._MAX_ANSWERS - 1), b"good")
    bench.turn()
    assert bench.as_of(b"good") == [0]
    bench.turn(PATIENCE_S)
    assert bench.desk.is_idle


def test_requests_wait_for_their_turn_no_longer_than_their_sender() -> None:
    bench = Bench(num_blocks=1)
    stuck = names(answers._MAX_ANSWERS)
    bench.router.stuck |= set(stuck)
    bench.ask(*stuck)
    bench.turn()
    bench.ask(b"early")
    bench.turn()
    bench.ask(b"late")
    bench.turn(PATIENCE_S - 1.0)
    assert not bench.router.sent
    bench.turn(1.0)
    bench.turn()
    assert (bench.as_of(b"early"), bench.as_of(b"late")) == ([], [0])


def test_while_too_many_bytes_are_under_way_an_older_snapshot_is_shared(
    num_encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_MAX_SNAPSHOT_BYTES", 10)
    bench = Bench(num_blocks=1)
    bench.router.stuck.add(b"stuck")
    bench.ask(b"stuck")
    bench.turn()
    for number, name in enumerate(names(3), 1):
        bench.store(number)
        bench.ask(name)
        bench.turn(answers._SHARED_S)
        assert bench.as_of(name) == [0]
    assert len(num_encoded) == 1


def test_what_is_too_much_to_wait_is_dropped_and_told_of_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(num_blocks=1)
    bench.router.stuck |= set(names(answers._MAX_ANSWERS))
    bench.ask(*names(answers._MAX_ANSWERS))
    bench.turn()
    with caplog.at_level(logging.WARNING):
        bench.ask(*[b"x-%d" % number for number in range(3 * answers._MAX_WAITING)])
        while bench.router.requests:
            bench.turn(0.0)
    assert len(bench.desk._waiting) == answers._MAX_WAITING
    assert 0 < len(caplog.records) < 15


def test_a_peer_that_has_gone_is_forgotten() -> None:
    bench = Bench(num_blocks=1)
    bench.router.gone.add(b"gone")
    bench.ask(b"gone", b"here")
    bench.turn()
    assert bench.desk.is_idle
    assert bench.as_of(b"here") == [0]


def test_batches_that_are_forgotten_during_a_replay_are_a_gap_in_it() -> None:
    bench = Bench(replay_batches=20)
    for block in range(20):
        bench.store(block)
        bench.stream.flush()
    replay = bench.stream.replay(0)
    assert [next(replay).seq for _ in range(3)] == [0, 1, 2]
    for block in range(20, 26):
        bench.store(block)
        bench.stream.flush()
    assert [message.seq for message in replay] == list(range(6, 20))
    bench.ask(b"peer", request=encode_seq(24))
    bench.turn()
    assert [seq for seq, _ in bench.router.sent[b"peer"]] == [24, 25, -1]
