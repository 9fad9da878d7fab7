"""Stops one thread of another process for a while, and nothing else of it: alive, and stuck.

`ptrace` stops threads, SIGSTOP only whole processes, which Triton takes for dead. A tracer is a thread, not a process,
and what it has stopped goes on when it ends: whoever stops a thread waits here until it is let go.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from pathlib import Path

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_ALL_CHILDREN = 0x40000000
"""`__WALL` of waitpid(2)."""


def find_thread(pid: int, name: str) -> int | None:
    """The id of a process's thread by the name that the kernel knows."""
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            if (task / "comm").read_text().strip() == name:
                return int(task.name)
    return None


def stop_thread(thread_id: int, seconds: float, release: threading.Event | None = None) -> None:
    """Stop a thread for so long, or until `release` is set; blocks meanwhile.

    Raises:
        OSError: It cannot be traced: it has ended, or the system forbids it.
    """
    errors: list[OSError] = []
    # A thread of its own: what a tracer has forgotten to let go goes on with the tracer's end.
    tracer = threading.Thread(
        target=_trace, args=(thread_id, seconds, release or threading.Event(), errors), name="kelp-chaos-tracer"
    )
    tracer.start()
    tracer.join()
    if errors:
        raise errors[0]


def _trace(thread_id: int, seconds: float, release: threading.Event, errors: list[OSError]) -> None:
    try:
        _ptrace(_SEIZE, thread_id)
        _ptrace(_INTERRUPT, thread_id)
        os.waitpid(thread_id, _ALL_CHILDREN)
        release.wait(seconds)
        # It may have been killed meanwhile: it stood still until then.
        with contextlib.suppress(ProcessLookupError):
            _ptrace(_DETACH, thread_id)
    except OSError as error:
        errors.append(error)


def _ptrace(request: int, thread_id: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    library.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    library.ptrace.restype = ctypes.c_long
    if library.ptrace(request, thread_id, None, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
