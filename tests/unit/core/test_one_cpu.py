"""A process that keeps to one CPU: all its threads, and not the CPU that another one has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kelp.core import one_cpu

CPUS = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")

SETTLES = """
import os, sys, threading
from kelp.core.one_cpu import settle_on_one_cpu
over = threading.Event()
threading.Thread(target=over.wait).start()
chosen = settle_on_one_cpu()
threading.Thread(target=over.wait).start()
masks = {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}
over.set()
assert masks == {frozenset({chosen})}, masks
"""
LOOKS = """
from kelp.core import one_cpu
print(*one_cpu._bound_elsewhere())
"""


@contextmanager
def bound_child(cpu: int) -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid
    process.communicate(b"\n")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """What threads of this process would be bound to."""
    sets: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cpus: sets.append(cpus))
    return sets


def test_all_threads_keep_to_one_cpu_those_that_are_started_later_too() -> None:
    assert subprocess.run([sys.executable, "-c", SETTLES]).returncode == 0


def test_the_cpus_of_other_processes_are_seen() -> None:
    for cpu in CPUS[:2]:
        with bound_child(cpu) as pid:
            assert one_cpu._bound_elsewhere()[pid] == cpu
        assert pid not in one_cpu._bound_elsewhere()


def test_processes_of_the_same_parent_take_turns_instead() -> None:
    with bound_child(CPUS[0]) as sibling:
        seen = subprocess.run([sys.executable, "-c", LOOKS], capture_output=True, text=True, check=True).stdout
        assert str(sibling) not in seen.split()
        assert sibling in one_cpu._bound_elsewhere()


@pytest.mark.parametrize(
    ("bound", "turns"),
    [({}, [3, 2, 1, 0, 3]), ({10: 3}, [2, 1, 0, 3, 2]), ({10: 3, 11: 1, 12: 1}, [2, 0, 3, 1, 2])],
    ids=["nobody", "one", "several"],
)
def test_each_turn_has_a_cpu_of_its_own_those_of_others_last(
    chosen: list[set[int]], monkeypatch: pytest.MonkeyPatch, bound: dict[int, int], turns: list[int]
) -> None:
    monkeypatch.setattr(one_cpu, "_bound_elsewhere", lambda: bound)
    assert [one_cpu.settle_on_one_cpu(turn) for turn in range(5)] == turns
    assert set(map(frozenset, chosen)) == {frozenset({cpu}) for cpu in turns}


def test_where_there_is_but_one_nothing_is_chosen(chosen: list[set[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert one_cpu.settle_on_one_cpu() is None
    assert not chosen


def test_a_system_that_does_not_allow_it_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: int, cpus: set[int]) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert one_cpu.settle_on_one_cpu() is None
