"""One thread sends for all streams; what a stream gains meanwhile goes out together."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from kelp.core.outbox import Outbox
from support.waiting import wait_until


@pytest.fixture
def outbox() -> Iterator[Outbox[int]]:
    made: Outbox[int] = Outbox("outbox under test")
    yield made
    made.close()


class Busy:
    """Keeps the sending thread where a test wants it."""

    def __init__(self, outbox: Outbox[int]) -> None:
        self._is_busy, self._is_free = threading.Event(), threading.Event()
        outbox.lane(self._flush).put(0)
        assert self._is_busy.wait(10.0)

    def _flush(self, _items: list[int]) -> None:
        self._is_busy.set()
        assert self._is_free.wait(10.0)

    def end(self) -> None:
        self._is_free.set()


def test_an_item_on_an_idle_stream_goes_out_alone(outbox: Outbox[int]) -> None:
    sent: list[list[int]] = []
    lane = outbox.lane(sent.append)
    for item in range(3):
        lane.put(item)
        wait_until(lambda: len(sent) > item)  # noqa: B023 - called at once
    assert sent == [[0], [1], [2]]


def test_items_queued_while_the_thread_is_busy_go_out_together_and_in_order(outbox: Outbox[int]) -> None:
    sent: list[list[int]] = []
    lane = outbox.lane(sent.append)
    busy = Busy(outbox)
    for item in range(5):
        lane.put(item)
    busy.end()
    wait_until(lambda: bool(sent))
    assert sent == [[0, 1, 2, 3, 4]]


def test_streams_take_turns(outbox: Outbox[int]) -> None:
    sent: list[tuple[str, list[int]]] = []
    first = outbox.lane(lambda items: sent.append(("first", items)))
    second = outbox.lane(lambda items: sent.append(("second", items)))
    busy = Busy(outbox)
    for item in range(4):
        first.put(item)
        second.put(item)
    busy.end()
    wait_until(lambda: len(sent) == 2)
    assert sent == [("first", [0, 1, 2, 3]), ("second", [0, 1, 2, 3])]


def test_no_item_is_lost_or_reordered_when_many_threads_put(outbox: Outbox[int]) -> None:
    num_items = 500
    sent: dict[int, list[int]] = {name: [] for name in range(4)}
    lanes = {name: outbox.lane(sent[name].extend) for name in sent}

    def produce(name: int) -> None:
        for item in range(num_items):
            lanes[name].put(item)

    producers = [threading.Thread(target=produce, args=(name,)) for name in sent]
    for producer in producers:
        producer.start()
    for producer in producers:
        producer.join()
    wait_until(lambda: all(len(items) >= num_items for items in sent.values()))
    assert all(items == list(range(num_items)) for items in sent.values())


def test_all_flushes_happen_in_the_one_sending_thread(outbox: Outbox[int]) -> None:
    threads: list[str] = []
    for _ in range(3):
        outbox.lane(lambda _: threads.append(threading.current_thread().name)).put(0)
    wait_until(lambda: len(threads) == 3)
    assert set(threads) == {"outbox under test"}


def test_a_stream_that_cannot_be_sent_does_not_stop_the_others(
    outbox: Outbox[int], caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[int] = []

    def break_down(_items: list[int]) -> None:
        raise RuntimeError("the pipe is gone")

    with caplog.at_level(logging.ERROR):
        outbox.lane(break_down).put(1)
        outbox.lane(sent.extend).put(2)
        wait_until(lambda: sent == [2])
    assert "the pipe is gone" in caplog.text


def test_a_stream_whose_flush_failed_sends_nothing_more_and_its_owner_hears_why_once(outbox: Outbox[int]) -> None:
    tried: list[int] = []
    failures: list[Exception] = []

    def fail(items: list[int]) -> None:
        tried.extend(items)
        raise RuntimeError("the pipe is gone")

    lane = outbox.lane(fail, failures.append)
    lane.put(1)
    wait_until(lambda: len(failures) == 1)
    lane.put(2)
    sent: list[int] = []
    outbox.lane(sent.extend).put(3)
    wait_until(lambda: sent == [3])
    assert tried == [1]
    assert [str(error) for error in failures] == ["the pipe is gone"]


def test_a_stream_without_an_owner_goes_on_after_a_flush_that_failed(outbox: Outbox[int]) -> None:
    tried: list[int] = []

    def fail_once(items: list[int]) -> None:
        tried.extend(items)
        if items == [1]:
            raise RuntimeError("once")

    lane = outbox.lane(fail_once)
    lane.put(1)
    wait_until(lambda: tried == [1])
    lane.put(2)
    wait_until(lambda: tried == [1, 2])


def test_closing_sends_what_is_queued() -> None:
    outbox: Outbox[int] = Outbox("outbox under test")
    sent: list[int] = []
    busy = Busy(outbox)
    outbox.lane(sent.extend).put(1)
    busy.end()
    outbox.close()
    assert sent == [1]


def test_an_item_that_is_the_next_one_due_can_be_sent_by_whoever_has_it(outbox: Outbox[int]) -> None:
    threads: list[int] = []
    lane = outbox.lane(lambda _: threads.append(threading.get_ident()))
    lane.send(1)
    assert threads == [threading.get_ident()]


def test_whoever_has_an_item_does_not_send_it_past_the_one_that_the_thread_sends(outbox: Outbox[int]) -> None:
    sent: list[int] = []
    busy = Busy(outbox)
    outbox.lane(sent.extend).send(1)
    assert sent == []
    busy.end()
    wait_until(lambda: sent == [1])


def test_what_a_stream_gains_while_its_owner_sends_goes_out_after_it_from_the_thread(outbox: Outbox[int]) -> None:
    sent: list[tuple[str, list[int]]] = []

    def flush(items: list[int]) -> None:
        if items == [1]:
            lane.put(2)
            lane.send(3)
        sent.append((threading.current_thread().name, items))

    lane = outbox.lane(flush)
    lane.send(1)
    wait_until(lambda: len(sent) == 2)
    assert sent == [(threading.current_thread().name, [1]), ("outbox under test", [2, 3])]


def test_an_owner_whose_own_sending_fails_hears_of_it_as_of_any_other(outbox: Outbox[int]) -> None:
    failures: list[Exception] = []

    def fail(_items: list[int]) -> None:
        raise RuntimeError("the pipe is gone")

    lane = outbox.lane(fail, failures.append)
    lane.send(1)
    lane.send(2)
    assert [str(error) for error in failures] == ["the pipe is gone"]


def test_an_item_that_another_one_follows_at_once_wakes_nobody_and_goes_out_with_that_one(outbox: Outbox[int]) -> None:
    sent: list[list[int]] = []
    lane = outbox.lane(sent.append)
    lane.add(1)
    other: list[int] = []
    outbox.lane(other.extend).put(0)
    wait_until(lambda: other == [0])
    assert sent == []
    lane.put(2)
    wait_until(lambda: sent == [[1, 2]])
