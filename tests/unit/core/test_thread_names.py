"""The kernel hears what Python calls a thread."""

from __future__ import annotations

import threading
from pathlib import Path

from kelp.core.threads import show_thread_name


def test_a_thread_is_known_to_the_kernel_by_the_beginning_of_its_name() -> None:
    seen: list[str] = []

    def look() -> None:
        show_thread_name()
        seen.append(Path("/proc/thread-self/comm").read_text().strip())

    thread = threading.Thread(target=look, name="kelp-thread-under-test")
    thread.start()
    thread.join()
    assert seen == ["kelp-thread-und"]
