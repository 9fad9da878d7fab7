"""Makes writes durable in the background, many at a time, so that nobody waits for the disk's cache."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)

_INTERVAL_S = 1.0
"""At most this much of what was written is lost with the machine's power; nothing with a process."""


class Flusher:
    """Calls `sync` at most once per interval while there is something new.

    Args:
        sync: May raise OSError: logged, and tried again with the next write.
    """

    def __init__(self, sync: Callable[[], None], interval_s: float = _INTERVAL_S) -> None:
        self._sync = sync
        self._interval_s = interval_s
        self._is_dirty = threading.Event()
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kelp-disk-flush", daemon=True)
        self._thread.start()

    def mark(self) -> None:
        """Something was written."""
        self._is_dirty.set()

    def stop(self) -> None:
        """Flush what is left and end."""
        self._is_stopping.set()
        self._is_dirty.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_stopping.is_set():
            self._is_dirty.wait()
            self._is_stopping.wait(self._interval_s)
            self._is_dirty.clear()
            try:
                self._sync()
            except OSError as error:
                _log.warning("disk tier: flushing: %s", error)
