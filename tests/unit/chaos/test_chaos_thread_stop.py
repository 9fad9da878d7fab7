"""One thread of a process stands still, the others go on."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from kelp.chaos.thread_stop import find_thread, stop_thread
from support.waiting import wait_until

_PROCESS = """
import itertools, sys, threading, time
from pathlib import Path

def count(name):
    Path("/proc/thread-self/comm").write_text(name)
    for number in itertools.count():
        Path(sys.argv[1], name).write_text(str(number))
        time.sleep(0.001)

for name in ("victim", "other"):
    threading.Thread(target=count, args=(name,), daemon=True).start()
threading.Event().wait()
"""


class Counting:
    """A process with two threads that count, each in a file."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.process = subprocess.Popen([sys.executable, "-c", _PROCESS, folder])

    def counted(self, name: str) -> int:
        try:
            with open(f"{self._folder}/{name}") as file:
                return int(file.read() or -1)
        except FileNotFoundError:
            return -1

    def wait_for_more(self, name: str) -> None:
        before = self.counted(name)
        wait_until(lambda: self.counted(name) > before + 1, f"more of {name}", 30)

    def thread(self, name: str) -> int:
        wait_until(lambda: find_thread(self.process.pid, name) is not None, f"thread {name}", 30)
        found = find_thread(self.process.pid, name)
        assert found is not None
        return found


@pytest.fixture
def counting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counting]:
    counting = Counting(str(tmp_path_factory.mktemp("counting")))
    yield counting
    counting.process.kill()
    counting.process.wait()


def test_the_thread_stands_still_while_others_count_and_goes_on_afterwards(counting: Counting) -> None:
    thread = counting.thread("victim")
    counting.wait_for_more("victim")
    try:
        stop_thread(thread, 0.0)
    except PermissionError:
        pytest.skip("this system lets nobody trace")
    while not _others_count_while_it_stands(counting, thread):
        counting.wait_for_more("victim")
    counting.wait_for_more("victim")


def test_a_thread_that_does_not_exist_is_not_found_and_cannot_be_stopped(counting: Counting) -> None:
    counting.thread("victim")
    assert find_thread(counting.process.pid, "nobody") is None
    with pytest.raises(OSError):
        stop_thread(2**22 + 1, 0.0)


def _others_count_while_it_stands(counting: Counting, thread: int) -> bool:
    """False where it was stopped with Python's lock in its hands, which lets nobody else count."""
    release = threading.Event()
    stopping = threading.Thread(target=stop_thread, args=(thread, 60.0, release))
    stopping.start()
    try:
        wait_until(lambda: _state(counting.process.pid, thread) == "t", "a traced stop", 30)
        stopped_at, others_at = counting.counted("victim"), counting.counted("other")
        with contextlib.suppress(AssertionError):
            wait_until(lambda: counting.counted("other") > others_at + 1, "more of other", 2)
        assert counting.counted("victim") == stopped_at
        return counting.counted("other") > others_at + 1
    finally:
        release.set()
        stopping.join()


def _state(pid: int, thread: int) -> str:
    with open(f"/proc/{pid}/task/{thread}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
