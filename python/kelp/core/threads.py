"""Names of threads as the system shows them (`top -H`, `/proc`): Python 3.11 keeps them to itself."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

_MAX_CHARS = 15


def show_thread_name() -> None:
    """Tell the kernel the name of the calling thread; does nothing where there is no `/proc`."""
    with contextlib.suppress(OSError):
        Path("/proc/thread-self/comm").write_text(threading.current_thread().name[:_MAX_CHARS])
