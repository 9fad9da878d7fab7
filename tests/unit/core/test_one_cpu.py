"""A process that keeps to one CPU: all its threads, and not the CPU that another one has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kelp.core import one_cpu

CPUS = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")

SETTLES = """
import os, sys, threading
from kelp.core.one_cpu import settle_on_one_cpu
over = threading.Event()
threading.Thread(target=over.wait).start()
chosen = settle_on_one_cpu(int(sys.argv[1]))
threading.Thread(target=over.wait).start()
masks = {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}
assert masks == {frozenset({chosen})}, masks
print(chosen, flush=True)
sys.stdin.read()
over.set()
"""


class Settled:
    """A process that keeps to one CPU until `end`."""

    def __init__(self, turn: int = 0, cpus: list[int] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SETTLES, str(turn)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=None if cpus is None else lambda: os.sched_setaffinity(0, cpus),
        )
        assert self._process.stdout is not None
        self.cpu = self._process.stdout.readline().strip()

    def end(self) -> int:
        self._process.communicate()
        return self._process.returncode


def test_all_threads_keep_to_one_cpu_those_that_are_started_later_too() -> None:
    settled = Settled()
    assert int(settled.cpu) in CPUS
    assert settled.end() == 0


def test_the_cpu_of_another_process_is_left_alone() -> None:
    pair = CPUS[:2]
    first = Settled(cpus=pair)
    second = Settled(cpus=pair)
    assert {int(first.cpu), int(second.cpu)} == set(pair)
    assert (first.end(), second.end()) == (0, 0)


def test_processes_that_settle_at_the_same_time_choose_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[set[int]] = []
    monkeypatch.setattr(one_cpu, "_bound_elsewhere", lambda: iter(()))
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cpus: chosen.append(cpus))
    assert one_cpu.settle_on_one_cpu(0) == CPUS[-1]
    assert one_cpu.settle_on_one_cpu(1) == CPUS[-2]
    assert one_cpu.settle_on_one_cpu(len(CPUS)) == CPUS[-1]
    assert chosen


def test_where_there_is_but_one_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert one_cpu.settle_on_one_cpu() is None


def test_a_system_that_does_not_allow_it_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: int, cpus: set[int]) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert one_cpu.settle_on_one_cpu() is None
