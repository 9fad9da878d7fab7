"""The publisher without sockets."""

from __future__ import annotations

import threading

from kelp.core.clock import FakeClock
from kelp.core.config import EventsConfig
from kelp.core.kv_events import BlocksCleared, BlocksRemoved, BlocksStored
from kelp.kv.events.codec import DigestExtension, SnapshotExtension, decode_own
from kelp.kv.events.residency import StreamDigest
from kelp.kv.events.stream import MAX_BATCH_BLOCKS, EventStream, StreamMessage
from support.event_doubles import SetIndex, digest16

LIMIT = 1 << 22


def new_stream(**config: int) -> EventStream:
    return EventStream("e", 16, EventsConfig(**config), FakeClock())  # type: ignore[arg-type]


def apply(index: SetIndex, *messages: StreamMessage) -> SetIndex:
    for message in messages:
        for event in decode_own(message.payload, LIMIT).events:
            index.apply(0, event)
    return index


def one(block: int) -> BlocksStored:
    return BlocksStored((digest16(block),), None)


def test_the_first_batch_clears_everything_and_the_rest_is_numbered_without_gaps() -> None:
    stream = new_stream()
    stream.put(one(1))
    messages = stream.flush()
    stream.put(one(2))
    messages += stream.flush()
    assert [message.seq for message in messages] == [0, 1]
    assert decode_own(messages[0].payload, LIMIT).events == (BlocksCleared(), one(1))
    assert {message.topic for message in messages} == {b"kelp-kv/e"}


def test_nothing_new_is_no_message() -> None:
    stream = new_stream()
    stream.flush()
    assert stream.flush() == []


def test_an_engine_far_ahead_of_the_publishing_thread_loses_nothing_and_fills_no_memory() -> None:
    stream, index = new_stream(max_queued_events=16), SetIndex()
    for block in range(10_000):
        stream.put(one(block))
        if block >= 100:
            stream.put(BlocksRemoved((digest16(block - 100),)))
    assert len(stream._queue) <= 16
    messages = stream.flush()
    assert len(messages) == 1
    apply(index, *messages)
    assert {block for _, block in index.held()} == {digest16(block) for block in range(9_900, 10_000)}


def test_the_ring_keeps_the_last_batches_within_its_bytes() -> None:
    stream = new_stream(replay_batches=5, replay_bytes=1024)
    for block in range(10):
        stream.put(one(block))
        stream.flush()
    assert [message.seq for message in stream.replay(0)] == [5, 6, 7, 8, 9]
    assert [message.seq for message in stream.replay(8)] == [8, 9]
    assert list(stream.replay(10)) == []
    stream.put(BlocksStored(tuple(digest16(block) for block in range(1000, 1100)), None))
    stream.flush()
    assert list(stream.replay(0)) == []


def test_a_snapshot_is_what_all_batches_so_far_lead_to() -> None:
    stream, told = new_stream(), SetIndex()
    num_blocks = MAX_BATCH_BLOCKS + 10
    stream.put(BlocksStored(tuple(digest16(block) for block in range(num_blocks)), None))
    apply(told, *stream.flush())
    stream.put(BlocksRemoved((digest16(3),)))
    changes, parts = stream.snapshot()
    apply(told, *changes)
    stream.put(one(num_blocks))
    stream.flush()
    messages = list(parts)
    assert apply(SetIndex(), *messages).held() == told.held()
    extensions = [decode_own(message.payload, LIMIT).extension for message in messages]
    assert extensions == [SnapshotExtension(0, False), SnapshotExtension(1, True)]
    assert {message.seq for message in messages} == {changes[-1].seq}


def test_a_snapshot_of_nothing_has_one_part() -> None:
    _, parts = new_stream().snapshot()
    (part,) = parts
    batch = decode_own(part.payload, LIMIT)
    assert (batch.events, batch.extension) == ((), SnapshotExtension(0, True))


def test_the_digest_is_of_the_batches_sent_and_not_of_what_waits() -> None:
    stream, digest = new_stream(), StreamDigest()
    stream.put(one(1))
    for message in stream.flush():
        digest.apply(decode_own(message.payload, LIMIT).events)
    stream.put(one(2))
    extension = decode_own(stream.digest().payload, LIMIT).extension
    assert isinstance(extension, DigestExtension)
    assert extension.tiers == digest.tiers()
    assert stream.digest().seq == stream.last_seq == 0


def test_an_engine_thread_that_overflows_the_queue_while_it_is_emptied_keeps_the_order() -> None:
    stream, index = new_stream(max_queued_events=16), SetIndex()
    blocks = [digest16(block) for block in range(7)]

    def engine() -> None:
        for number in range(20_000):
            stream.put(
                BlocksStored((blocks[number % 7],), None) if number % 2 else BlocksRemoved((blocks[number % 7],))
            )

    plain = SetIndex()
    for number in range(20_000):
        block = (blocks[number % 7],)
        plain.apply(0, BlocksStored(block, None) if number % 2 else BlocksRemoved(block))
    thread = threading.Thread(target=engine)
    thread.start()
    while thread.is_alive():
        apply(index, *stream.flush())
    thread.join()
    apply(index, *stream.flush())
    assert index.held() == plain.held()
