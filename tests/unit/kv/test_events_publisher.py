"""The publisher's sockets, as vLLM's subscribers and ours use them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import psutil
import pytest
import zmq

from kelp.core.clock import SystemClock
from kelp.core.config import EventsConfig
from kelp.core.errors import ConfigError
from kelp.core.kv_events import BlocksStored
from kelp.kv.events import EventPublisher
from kelp.kv.events.codec import BlockStored, DigestExtension, SnapshotExtension, decode_foreign, decode_own
from kelp.kv.events.frames import SNAPSHOT_REQUEST, decode_seq, encode_seq
from support.event_doubles import digest16
from support.waiting import wait_until

LIMIT = 1 << 22
TIMEOUT_MS = 10_000


@contextlib.contextmanager
def publishing(**config: object) -> Iterator[EventPublisher]:
    publisher = EventPublisher("e", 16, EventsConfig.model_validate(config), SystemClock())
    publisher.start()
    try:
        yield publisher
    finally:
        publisher.close()


@contextlib.contextmanager
def connected(kind: int, endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(kind) as connection:
        connection.setsockopt(zmq.LINGER, 0)
        connection.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
        if kind == zmq.SUB:
            connection.setsockopt(zmq.SUBSCRIBE, b"")
        connection.connect(f"tcp://{endpoint}")
        yield connection


def store(publisher: EventPublisher, *blocks: int) -> None:
    for block in blocks:
        publisher.sink(BlocksStored((digest16(block),), digest16(block - 1) if block else None))


def answer(dealer: zmq.Socket[bytes], request: bytes) -> list[list[bytes]]:
    """Frames up to the end marker, which is left out."""
    dealer.send_multipart([b"", request])
    answers: list[list[bytes]] = []
    while True:
        empty, *frames = dealer.recv_multipart()
        assert empty == b""
        if decode_seq(frames[1]) == -1:
            return answers
        answers.append(frames)


def replayed(dealer: zmq.Socket[bytes], num_batches: int) -> list[list[bytes]]:
    batches: list[list[bytes]] = []

    def are_there() -> bool:
        batches[:] = answer(dealer, encode_seq(0))
        return len(batches) >= num_batches

    wait_until(are_there, "the batches")
    return batches


def test_a_vllm_subscriber_reads_events_and_is_not_disturbed_by_digests() -> None:
    with publishing(digest_interval_s=0.01) as publisher, connected(zmq.SUB, publisher.endpoint) as sub:
        topic = b""
        while topic != b"kelp-digest/e":
            topic, seq, payload = sub.recv_multipart()
        assert decode_foreign(payload, LIMIT).events == []
        last_seq = decode_seq(seq)
        store(publisher, 0, 1)
        while topic != b"kelp-kv/e":
            topic, seq, payload = sub.recv_multipart()
        assert decode_seq(seq) == last_seq + 1
        (stored,) = decode_foreign(payload, LIMIT).events
        assert isinstance(stored, BlockStored)
        assert (stored.block_hashes, stored.medium) == ([digest16(0), digest16(1)], "GPU")
        while topic != b"kelp-digest/e":
            topic, seq, payload = sub.recv_multipart()
        extension = decode_own(payload, LIMIT).extension
        assert isinstance(extension, DigestExtension)
        assert extension.tiers[0].num_blocks == 2


def test_missed_batches_are_repeated_as_vllm_repeats_them() -> None:
    with publishing(flush_interval_s=0.001) as publisher, connected(zmq.DEALER, publisher.replay_endpoint) as dealer:
        replayed(dealer, 1)
        store(publisher, 0)
        batches = replayed(dealer, 2)
        assert [decode_seq(frames[1]) for frames in batches] == [0, 1]
        assert decode_own(batches[1][2], LIMIT).events == (BlocksStored((digest16(0),), None),)
        assert answer(dealer, encode_seq(2)) == []


def test_a_snapshot_tells_everything_as_of_a_batch() -> None:
    with publishing() as publisher, connected(zmq.DEALER, publisher.replay_endpoint) as dealer:
        store(publisher, *range(5000))
        parts = answer(dealer, SNAPSHOT_REQUEST)
        batches = [decode_own(payload, LIMIT) for _, _, payload in parts]
        assert [batch.extension for batch in batches] == [SnapshotExtension(0, False), SnapshotExtension(1, True)]
        blocks = [block for batch in batches for event in batch.events for block in event.hashes]  # type: ignore[union-attr]
        assert blocks == [digest16(block) for block in range(5000)]
        assert {frames[0] for frames in parts} == {b"kelp-snapshot/e"}


def test_requests_that_are_none_are_left_unanswered_and_harm_nobody() -> None:
    with publishing() as publisher, connected(zmq.DEALER, publisher.replay_endpoint) as dealer:
        for frames in (
            [b"", b"short"],
            [b"alone"],
            [b"", encode_seq(-1)[:7] + b"\0"],
            [b""] * 9,
            [b"x", encode_seq(0)],
        ):
            dealer.send_multipart(frames)
        replayed(dealer, 1)


def test_a_subscriber_that_does_not_read_holds_up_nobody() -> None:
    config = {"replay_batches": 100_000, "flush_interval_s": 0.0001, "request_timeout_s": 0.2}
    with publishing(**config) as publisher, connected(zmq.DEALER, publisher.replay_endpoint) as dealer:
        replayed(dealer, 1)
        store(publisher, *range(4096))
        replayed(dealer, 2)
        with connected(zmq.DEALER, publisher.replay_endpoint) as stuck:
            stuck.setsockopt(zmq.RCVHWM, 1)
            for _ in range(2000):
                stuck.send_multipart([b"", SNAPSHOT_REQUEST])
            assert len(answer(dealer, SNAPSHOT_REQUEST)) == 1


def test_a_taken_port_is_a_configuration_error_that_names_the_field() -> None:
    with publishing() as publisher:
        port = int(publisher.endpoint.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"events.port: 127.0.0.1:{port} cannot be bound"):
            EventPublisher("f", 16, EventsConfig(port=port), SystemClock())


def test_it_binds_the_loopback_address_unless_told_otherwise() -> None:
    with publishing() as publisher:
        assert publisher.endpoint.startswith("127.0.0.1:")
        assert publisher.replay_endpoint.startswith("127.0.0.1:")


def test_closing_leaves_no_thread_and_no_descriptor() -> None:
    process = psutil.Process()
    with publishing() as warm_up:
        store(warm_up, 1)
    num_descriptors, threads = process.num_fds(), set(threading.enumerate())
    for _ in range(3):
        with publishing() as publisher:
            store(publisher, 1)
        publisher.close()
    assert set(threading.enumerate()) == threads
    assert process.num_fds() <= num_descriptors


def test_a_publisher_that_never_started_can_be_closed() -> None:
    publisher = EventPublisher("e", 16, EventsConfig(), SystemClock())
    store(publisher, 1)
    publisher.close()


def test_dropped_batches_are_missing_from_the_stream_and_not_from_a_replay() -> None:
    with (
        publishing(drop_share=0.99, flush_interval_s=0.001) as publisher,
        connected(zmq.SUB, publisher.endpoint) as sub,
        connected(zmq.DEALER, publisher.replay_endpoint) as dealer,
    ):
        sub.setsockopt(zmq.RCVTIMEO, 0)
        replayed(dealer, 1)
        for block in range(20):
            store(publisher, block)
            replayed(dealer, block + 2)
        received = 0
        with contextlib.suppress(zmq.Again):
            while True:
                received += sub.recv_multipart()[0] == b"kelp-kv/e"
        assert received < 20


def received_numbers(publisher: EventPublisher, count: int) -> list[int]:
    """Of so many batches, published one by one, in the order in which they come."""
    numbers: list[int] = []
    with connected(zmq.SUB, publisher.endpoint) as sub:
        for block in range(10_000):
            store(publisher, block)
            while sub.poll(5):
                _, number, payload = sub.recv_multipart()
                if decode_own(payload, LIMIT).events:
                    numbers.append(decode_seq(number))
            if len(numbers) >= count:
                return numbers
    raise AssertionError("too few batches came")


def test_doubled_batches_come_twice_with_the_same_number() -> None:
    with publishing(duplicate_share=0.99, flush_interval_s=0.001, digest_interval_s=3600.0) as publisher:
        numbers = received_numbers(publisher, 20)
    assert numbers == sorted(numbers)
    assert len(set(numbers)) < len(numbers)


def test_late_batches_come_after_the_one_that_follows_them() -> None:
    with publishing(reorder_share=0.99, flush_interval_s=0.001, digest_interval_s=3600.0) as publisher:
        numbers = received_numbers(publisher, 20)
    assert numbers != sorted(numbers)
    assert len(set(numbers)) == len(numbers)


def test_every_event_goes_out_whenever_it_comes() -> None:
    with publishing(flush_interval_s=0.001) as publisher, connected(zmq.DEALER, publisher.replay_endpoint) as dealer:
        for block in range(20):
            num_batches = len(replayed(dealer, 1))
            store(publisher, block)
            batches = replayed(dealer, num_batches + 1)
            (stored,) = decode_own(batches[-1][2], LIMIT).events
            assert isinstance(stored, BlocksStored) and stored.hashes == (digest16(block),)


def test_events_that_come_within_the_interval_share_a_message() -> None:
    with publishing(flush_interval_s=60.0) as publisher, connected(zmq.DEALER, publisher.replay_endpoint) as dealer:
        replayed(dealer, 1)
        store(publisher, 0, 1)
        assert len(answer(dealer, encode_seq(0))) == 1
        store(publisher, 2)
        answer(dealer, SNAPSHOT_REQUEST)
        _, shared = answer(dealer, encode_seq(0))
        assert decode_own(shared[2], LIMIT).events == (BlocksStored(tuple(map(digest16, range(3))), None),)
