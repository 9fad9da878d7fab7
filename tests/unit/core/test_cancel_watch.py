"""One thread notices clients that have gone, and asks about nothing that has ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kelp.core.cancel_watch import CancelWatch
from support.exchange import FakeExchange
from support.waiting import wait_until

POLL_S = 0.001


class AskedExchange(FakeExchange):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__({})
        self.num_asked = 0
        self.asked_by: set[str] = set()

    def is_cancelled(self) -> bool:
        self.num_asked += 1
        self.asked_by.add(threading.current_thread().name)
        return super().is_cancelled()


@pytest.fixture
def watch() -> Iterator[CancelWatch]:
    made = CancelWatch(POLL_S)
    yield made
    made.close()


def test_a_client_that_goes_is_reported_once(watch: CancelWatch) -> None:
    exchange, other = AskedExchange(), AskedExchange()
    reports: list[int] = []
    with watch.watching(exchange, lambda: reports.append(1)), watch.watching(other, lambda: reports.append(2)):
        exchange.cancel()
        wait_until(lambda: bool(reports))
        num_asked = other.num_asked
        wait_until(lambda: other.num_asked > num_asked + 3, "further polls")
    assert reports == [1]


def test_a_client_that_stays_is_not_reported(watch: CancelWatch) -> None:
    exchange = AskedExchange()
    reports: list[int] = []
    with watch.watching(exchange, lambda: reports.append(1)):
        wait_until(lambda: exchange.num_asked > 3)
    assert reports == []


def test_a_request_that_has_ended_is_asked_about_no_more(watch: CancelWatch) -> None:
    ended, running = AskedExchange(), AskedExchange()
    with watch.watching(running, lambda: None):
        with watch.watching(ended, lambda: None):
            wait_until(lambda: ended.num_asked > 0)
        # One poll may have been under way.
        num_polls = running.num_asked
        wait_until(lambda: running.num_asked > num_polls + 1)
        num_asked, num_polls = ended.num_asked, running.num_asked
        wait_until(lambda: running.num_asked > num_polls + 5)
        assert ended.num_asked == num_asked


def test_a_cancellation_noticed_after_the_end_is_not_reported(watch: CancelWatch) -> None:
    is_asked, may_answer = threading.Event(), threading.Event()

    class SlowExchange(FakeExchange):
        def is_cancelled(self) -> bool:
            is_asked.set()
            assert may_answer.wait(10.0)
            return True

    reports: list[int] = []
    after = AskedExchange()
    with watch.watching(SlowExchange({}), lambda: reports.append(1)):
        assert is_asked.wait(10.0)
    with watch.watching(after, lambda: None):
        may_answer.set()
        wait_until(lambda: after.num_asked > 0, "the next poll")
    assert reports == []


def test_a_request_that_fails_is_forgotten_too(watch: CancelWatch) -> None:
    exchange = AskedExchange()
    reports: list[int] = []
    with pytest.raises(RuntimeError), watch.watching(exchange, lambda: reports.append(1)):
        raise RuntimeError
    exchange.cancel()
    later = AskedExchange()
    with watch.watching(later, lambda: None):
        wait_until(lambda: later.num_asked > 3)
    assert reports == []


def test_only_the_watch_thread_asks(watch: CancelWatch) -> None:
    exchange = AskedExchange()
    with watch.watching(exchange, lambda: None):
        wait_until(lambda: exchange.num_asked > 0)
    assert exchange.asked_by == {"kelp-cancel-watch"}


def test_an_exchange_that_cannot_be_asked_does_not_blind_the_watch(
    watch: CancelWatch, caplog: pytest.LogCaptureFixture
) -> None:
    class BrokenExchange(FakeExchange):
        def is_cancelled(self) -> bool:
            raise RuntimeError("the server has gone")

    gone = FakeExchange({})
    reports: list[int] = []
    with watch.watching(BrokenExchange({}), lambda: None):
        wait_until(lambda: "the server has gone" in caplog.text)
        with watch.watching(gone, lambda: reports.append(1)):
            gone.cancel()
            wait_until(lambda: bool(reports))
    assert len(caplog.records) == 1, "asked again although it cannot answer"


def test_a_callback_that_fails_does_not_blind_the_watch(watch: CancelWatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("Event loop is closed")

    first, second = FakeExchange({}), FakeExchange({})
    reports: list[int] = []
    with watch.watching(first, fail), watch.watching(second, lambda: reports.append(1)):
        first.cancel()
        wait_until(lambda: "Event loop is closed" in caplog.text)
        second.cancel()
        wait_until(lambda: bool(reports))


def test_closing_ends_the_thread_whether_or_not_anything_is_watched() -> None:
    idle, busy = CancelWatch(POLL_S), CancelWatch(POLL_S)
    with busy.watching(FakeExchange({}), lambda: None):
        busy.close()
    idle.close()
    names = [thread.name for thread in threading.enumerate()]
    assert "kelp-cancel-watch" not in names


def test_a_request_that_ends_within_the_interval_is_never_asked_about() -> None:
    watch, exchange = CancelWatch(poll_s=3600.0), AskedExchange()
    with watch.watching(exchange, lambda: None):
        pass
    watch.close()
    assert exchange.num_asked == 0
