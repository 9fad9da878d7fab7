"""A process of several Python threads on one CPU.

Hardly more than one of its threads runs at a time, the one that has the interpreter's lock. On several CPUs each system
call of one thread wakes another on another CPU, which finds the lock taken again when it gets there: both lose time to
that, and everybody else a CPU. On one, the other thread waits its turn. Not for processes that compute in threads
without the lock.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from pathlib import Path

_PROC = Path("/proc")
_ALLOWED = "Cpus_allowed_list:"
_MEMORY = "VmSize:"
_PARENT = "PPid:"


def settle_on_one_cpu(turn: int = 0) -> int | None:
    """Keep all threads of this process, and those that they start, on one of the CPUs that it may use.

    It is one that as few other processes as possible are bound to, as far as they can be seen.

    Args:
        turn: Its number among the processes of the same parent that do the same; they choose one after the other.

    Returns:
        The CPU; None if there is but one, or the system does not let us.
    """
    allowed = sorted(os.sched_getaffinity(0), reverse=True)
    if len(allowed) < 2:
        return None
    num_bound = Counter(_bound_elsewhere().values())
    # Of several that are as good the last one: the first takes most interrupts.
    chosen = sorted(allowed, key=num_bound.__getitem__)[turn % len(allowed)]
    try:
        for thread in os.listdir(_PROC / "self" / "task"):
            # It may have ended meanwhile.
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), {chosen})
    except OSError:
        return None
    return chosen


def _bound_elsewhere() -> dict[int, int]:
    """By process, the CPU of each that has but one; the kernel's own and those of our parent do not count."""
    found = {}
    for folder in _PROC.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            lines = (folder / "status").read_text(errors="replace").splitlines()
        except OSError:
            continue
        fields = dict(line.split(None, 1) for line in lines if line.startswith((_ALLOWED, _MEMORY, _PARENT)))
        cpus = fields.get(_ALLOWED, "").strip()
        if _MEMORY in fields and cpus.isdecimal() and int(fields[_PARENT]) != os.getppid():
            found[int(folder.name)] = int(cpus)
    return found
