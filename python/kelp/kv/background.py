"""Threads whose work can wait: they run when the cores have nothing better to do."""

from __future__ import annotations

import os
import sys
import threading

NICENESS = 10
"""A tenth of the share of a thread beside which it runs; still enough to end within seconds."""


def yield_to_others() -> None:
    """Lower the priority of the calling thread, and of no other; on Linux, where threads have one each."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
        # Whoever wakes up with work to do does not interrupt the one that computes.
        os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
