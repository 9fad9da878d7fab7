"""The processes of one server under test, and the CPU time each has used.

A Python model of Triton is a stub process, a child of tritonserver, whose command line carries the name of the model
instance (`llm_0_0`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import psutil

SERVER = "tritonserver"
_STUB = "triton_python_backend_stub"
_INSTANCE = re.compile(r"\b(\w+?)_0_0\b")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_UTIME_AND_STIME = slice(11, 13)
"""Positions in /proc/<pid>/stat after the command name."""


def name_of(arguments: list[str]) -> str:
    """`tritonserver`, the model's name for a stub, or nothing for any other process."""
    if any(_STUB in argument for argument in arguments[:2]):
        for argument in arguments:
            if found := _INSTANCE.search(argument):
                return found.group(1)
        return ""
    return SERVER if any(argument.endswith(SERVER) for argument in arguments[:2]) else ""


def find_processes(serve_pid: int) -> dict[str, int]:
    """Process ids by name, of everything that a `kelp serve` started."""
    found: dict[str, int] = {}
    for process in psutil.Process(serve_pid).children(recursive=True):
        try:
            name = name_of(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if name:
            found.setdefault(name, process.pid)
    return found


def cpu_s(pid: int) -> float:
    """User and system time of all threads so far, in steps of a clock tick; 0 for a process that has gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    # The command name may hold spaces and parentheses, so the fields are counted from its last parenthesis.
    fields = text.rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[_UTIME_AND_STIME]) / _TICKS_PER_S


def cpu_times_s(pids: dict[str, int]) -> dict[str, float]:
    """CPU time by process name."""
    return {name: cpu_s(pid) for name, pid in pids.items()}


def total_by_name(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Sum by name."""
    totals: dict[str, float] = {}
    for part in parts:
        for name, seconds in part.items():
            totals[name] = totals.get(name, 0.0) + seconds
    return totals
