"""Notices clients that have gone.

Triton tells a Python model about a cancellation only when asked, and asking is a round trip between processes: one
thread asks for all open requests, a few times a second, so that no event loop blocks. The first question comes an
interval after the request: most short ones end before it, and would pay for it while their first token is on its way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kelp.core.exchange import Exchange

_log = logging.getLogger(__name__)
_MAX_ASKED_PER_S = 128
"""Many open requests are asked about less often: a question costs two processes some 50 us."""
_LONGEST_INTERVAL_S = 1.0


@dataclass(frozen=True, eq=False)
class _Watched:
    exchange: Exchange
    on_cancel: Callable[[], object]


class CancelWatch:
    """The polling thread."""

    def __init__(self, poll_s: float) -> None:
        self._poll_s = poll_s
        self._lock = threading.Lock()
        self._watched: set[_Watched] = set()
        self._has_work = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kelp-cancel-watch", daemon=True)
        self._thread.start()

    @contextmanager
    def watching(self, exchange: Exchange, on_cancel: Callable[[], object]) -> Iterator[None]:
        """Call `on_cancel`, once and from the watch thread, if the client goes while the block runs."""
        watched = _Watched(exchange, on_cancel)
        with self._lock:
            self._watched.add(watched)
            if not self._has_work.is_set():
                self._has_work.set()
        try:
            yield
        finally:
            self._forget(watched)

    def close(self) -> None:
        """Stop the thread."""
        self._stopping.set()
        self._has_work.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._has_work.wait()
            interval_s = min(_LONGEST_INTERVAL_S, len(self._watched) / _MAX_ASKED_PER_S)
            self._stopping.wait(max(self._poll_s, interval_s))
            self._poll()

    def _poll(self) -> None:
        with self._lock:
            watched = list(self._watched)
            if not watched and not self._stopping.is_set():
                self._has_work.clear()
        for item in watched:
            try:
                self._ask(item)
            except Exception:
                _log.exception("a client cannot be watched; its request goes on without")
                self._forget(item)

    def _ask(self, item: _Watched) -> None:
        if item.exchange.is_cancelled() and self._forget(item):
            item.on_cancel()

    def _forget(self, item: _Watched) -> bool:
        """Whether it was still watched."""
        with self._lock:
            is_open = item in self._watched
            self._watched.discard(item)
        return is_open
