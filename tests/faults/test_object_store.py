"""Faults of the object store: each costs bounded time, none a wrong byte, and all is well when the store is back."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from kelp.core.errors import RetryableTransferError
from s3_server import S3Server, aws_environment, s3_server
from support.faulty_relay import FaultyRelay
from support.object_rig import ARENA_PREFIX, GROUP_BLOCKS, Bucket, ObjectRig, Story
from support.waiting import wait_until

__all__ = ["s3_server"]

TIMEOUT_S, RETRY_S = 1.0, 0.5
BOUND_S = 15.0
"""Well above what a call may take on a loaded machine, well below the 25 s that the AWS SDK alone would take."""
RECOVERY_S = 60.0

FAULTS: dict[str, Callable[[FaultyRelay], None]] = {
    "refuses connections": FaultyRelay.go_down,
    "never answers": FaultyRelay.fall_silent,
    "is slow": FaultyRelay.slow_down,
    "answers 500": lambda relay: relay.fail(500),
    "answers 503": lambda relay: relay.fail(503),
}


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    aws_environment(monkeypatch)
    bucket = Bucket(s3_server)
    yield bucket
    bucket.close()


@pytest.fixture
def relay(s3_server: S3Server, bucket: Bucket) -> Iterator[FaultyRelay]:
    """On the way to the store; when it and all hosts are closed, nothing of them is left."""
    gc.collect()
    before = _footprint()
    relay = FaultyRelay(s3_server.port)
    yield relay
    relay.close()
    try:
        wait_until(lambda: not _footprint() - before, timeout_s=10.0)
    except AssertionError:
        pytest.fail(f"left behind: {dict(_footprint() - before)}, open now: {_open_files()}")


@pytest.fixture
def new_host(s3_server: S3Server, bucket: Bucket, relay: FaultyRelay) -> Iterator[Callable[..., ObjectRig]]:
    """Makes hosts that reach the store through the relay."""
    with ExitStack() as stack:

        def make(**settings: Any) -> ObjectRig:
            defaults = {"timeout_s": TIMEOUT_S, "retry_after_s": RETRY_S, "block_bytes": 64 * 1024}
            return stack.enter_context(ObjectRig(s3_server, bucket.name, relay.endpoint, **{**defaults, **settings}))

        yield make


def _footprint() -> Counter[str]:
    """Open files, children and arenas of this process; what other tests left to be collected may go meanwhile."""
    own = psutil.Process()
    left = Counter({"open files": own.num_fds()})
    left.update(f"process {child.pid}" for child in own.children(recursive=True))
    left.update(path.name for path in Path("/dev/shm").glob(f"{ARENA_PREFIX}*"))
    return left


def _open_files() -> list[str]:
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(os.readlink(link))
    return sorted(names)


def _within_bound(call: Callable[[], Any]) -> Any:
    started_s = time.monotonic()
    try:
        return call()
    finally:
        assert time.monotonic() - started_s < BOUND_S, "the fault took too long"


def _large(seed: int, num_groups: int = 1) -> Story:
    return Story(seed, num_groups * GROUP_BLOCKS, block_bytes=64 * 1024)


def _wait_available(host: ObjectRig) -> None:
    wait_until(lambda: host.tier.is_available, "the object tier", RECOVERY_S)


def _until_it_answers(host: ObjectRig, story: Story) -> None:
    """Store a group as soon as the tier lets it through; a probe may come too early."""

    def is_stored() -> bool:
        _wait_available(host)
        return bool(_within_bound(lambda: host.put(story)))

    wait_until(is_stored, "the recovery", RECOVERY_S)
    assert host.tier.state == "closed"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_store_is_left_alone_and_taken_up_again(
    new_host: Callable[..., ObjectRig], relay: FaultyRelay, fault: str
) -> None:
    host, stored, fresh, unknown = new_host(max_failures=2), _large(1), _large(2), _large(3)
    assert host.put(stored)

    FAULTS[fault](relay)
    calls: list[Callable[[], Any]] = [
        lambda: host.get(stored, 0, GROUP_BLOCKS),
        lambda: host.put(fresh),
        lambda: host.find(unknown),
    ]
    num_calls = 0
    while host.tier.state not in ("open", "half-open"):
        result = _within_bound(calls[num_calls % len(calls)])
        assert result in ([None] * GROUP_BLOCKS, False, 0)
        num_calls += 1
        wait_until(lambda: host.tier.state != "starting", "the process", RECOVERY_S)
        assert num_calls < 10, "the breaker did not open"
    assert host.count("num_failures") >= 2
    with contextlib.suppress(RetryableTransferError):
        _within_bound(host.tier.refresh)

    relay.recover()
    _until_it_answers(host, fresh)
    assert host.get(stored, 0, GROUP_BLOCKS) == stored.records
    assert host.get(fresh, 0, GROUP_BLOCKS) == fresh.records


def test_a_store_that_refuses_connections_costs_a_fraction_of_the_time_limit(
    new_host: Callable[..., ObjectRig], relay: FaultyRelay
) -> None:
    host, story = new_host(timeout_s=30.0, max_failures=3, retry_after_s=3600), _large(22)
    relay.go_down()
    started_s = time.monotonic()
    while host.tier.state == "closed":
        assert (host.find(story), host.put(story)) == (0, False)
    assert time.monotonic() - started_s < 10.0, "what all requests wait for before the store is left alone"
    assert (host.count("num_failures"), host.count("num_timeouts")) == (3, 0)
    relay.recover()
    before, started_s = relay.num_connections, time.monotonic()
    assert not any(host.put(story) for _ in range(100))
    assert time.monotonic() - started_s < 1.0, "a hundred requests to a store that is left alone"
    assert relay.num_connections == before
    assert host.count("num_refused") >= 100


def test_a_store_that_does_not_answer_costs_its_time_limit_as_often_as_the_breaker_says(
    new_host: Callable[..., ObjectRig], relay: FaultyRelay
) -> None:
    host, story = new_host(max_failures=2, retry_after_s=3600), _large(23)
    relay.fall_silent()
    for number in (1, 2):
        assert not _within_bound(lambda: host.put(story))
        assert (host.count("num_timeouts"), host.count("num_failures")) == (number, number)
        wait_until(lambda: host.tier.state != "starting", "the process", RECOVERY_S)
    assert host.tier.state == "open"


def test_an_open_breaker_lets_nothing_through(new_host: Callable[..., ObjectRig], relay: FaultyRelay) -> None:
    host, story = new_host(max_failures=1, retry_after_s=3600), _large(4)
    relay.go_down()
    assert not host.put(story)
    relay.recover()
    before = relay.num_connections
    assert (host.put(story), host.find(story)) == (False, 0)
    assert host.get(story, 0, GROUP_BLOCKS) == [None] * GROUP_BLOCKS
    with pytest.raises(RetryableTransferError):
        host.tier.refresh()
    assert relay.num_connections == before
    assert host.count("num_refused") >= 3


def test_what_could_not_be_cleared_is_cleared_when_the_store_is_back(
    new_host: Callable[..., ObjectRig], relay: FaultyRelay, bucket: Bucket
) -> None:
    host, story = new_host(), _large(5)
    assert host.put(story)
    relay.go_down()
    with pytest.raises(RetryableTransferError):
        _within_bound(lambda: host.tier.forget(story.tenant))
    assert host.find(story) == 0
    relay.recover()

    def is_cleared() -> bool:
        _wait_available(host)
        host.tier.refresh()
        return not bucket.list_keys()

    wait_until(is_cleared, "the clearing", RECOVERY_S)


def test_slots_are_the_callers_again_when_a_read_that_is_stuck_returns(
    new_host: Callable[..., ObjectRig], relay: FaultyRelay
) -> None:
    host, story, filler = new_host(), _large(6), _large(7)
    assert host.put(story)
    relay.slow_down()
    stuck = host.tier.process_id
    assert host.get(story, 0, GROUP_BLOCKS) == [None] * GROUP_BLOCKS
    assert host.tier.quarantined() == frozenset()
    assert stuck is not None
    assert not psutil.pid_exists(stuck), "a process that may write into the slots is still there"
    host.arena.fill(range(8, 8 + GROUP_BLOCKS), filler.contents)
    relay.recover()
    _until_it_answers(host, _large(8))
    assert [host.arena.content(8 + index) for index in range(GROUP_BLOCKS)] == filler.contents


def test_slots_of_a_process_that_does_not_die_are_set_aside_until_it_does(
    new_host: Callable[..., ObjectRig], relay: FaultyRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, story = new_host(), _large(9)
    assert host.put(story)
    process = host.tier.process_id
    assert process is not None
    monkeypatch.setattr("kelp.kv.tiers.objects.process._DEATH_TIMEOUT_S", 0.01)
    monkeypatch.setattr("subprocess.Popen.kill", lambda popen: None)
    relay.fall_silent()
    assert host.get(story, 0, GROUP_BLOCKS, first_slot=12) == [None] * GROUP_BLOCKS
    assert host.tier.quarantined() == frozenset(range(12, 12 + GROUP_BLOCKS))
    assert not host.tier.is_available

    monkeypatch.undo()
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: not host.tier.quarantined(), "the end of the quarantine")


@pytest.mark.parametrize("seed", range(3))
def test_a_process_killed_at_any_moment_costs_a_miss_and_no_wrong_byte(
    new_host: Callable[..., ObjectRig], seed: int
) -> None:
    chance = random.Random(seed)
    host, stored = new_host(timeout_s=20.0, max_failures=1000), _large(10 + seed, 4)
    host.put_all(stored)
    done = threading.Event()

    def kill_now_and_then() -> None:
        while not done.wait(chance.uniform(0.0, 0.1)):
            pid = host.tier.process_id
            if pid is not None and host.tier.is_available:
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        for number in itertools.count():
            _wait_available(host)
            host.get(stored, 0, len(stored.names))
            host.put(_large(1000 * (seed + 1) + number))
            if host.tier.counters.num_starts > 3:
                break
    finally:
        done.set()
        killer.join()
    _wait_available(host)
    assert host.get(stored, 0, len(stored.names)) == stored.records
    assert host.count("num_damaged") == 0


def test_a_killed_process_leaves_no_part_of_an_object(
    new_host: Callable[..., ObjectRig], relay: FaultyRelay, bucket: Bucket
) -> None:
    host, story = new_host(timeout_s=30.0), _large(20)
    relay.slow_down()
    results: list[bool] = []
    writer = threading.Thread(target=lambda: results.append(host.put(story)))
    before = relay.num_relayed_bytes
    writer.start()
    wait_until(lambda: relay.num_relayed_bytes > before + 16 * 1024, "the upload")
    pid = host.tier.process_id
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    writer.join()
    relay.recover()
    assert results == [False]
    assert bucket.list_keys() == []
    _until_it_answers(host, story)
    assert host.get(story, 0, GROUP_BLOCKS) == story.records


def test_closing_does_not_wait_for_a_store_that_does_not_answer(
    new_host: Callable[..., ObjectRig], relay: FaultyRelay
) -> None:
    host, story = new_host(timeout_s=600.0), _large(21)
    relay.fall_silent()
    before = relay.num_connections
    results: list[bool] = []
    writer = threading.Thread(target=lambda: results.append(host.put(story)))
    writer.start()
    wait_until(lambda: relay.num_connections > before, "the request")
    _within_bound(host.tier.close)
    writer.join(BOUND_S)
    assert results == [False]
