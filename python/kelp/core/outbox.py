"""Adaptive coalescing: sends what has queued up, at once when idle, together when behind.

A response costs the same CPU whatever it holds (about 145 us through Triton, 200 more per relay), so under load
several tokens must share one. No timer decides how many: one thread sends for all streams, and whatever a
stream gains while the thread is busy elsewhere goes out in that stream's next response.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_log = logging.getLogger(__name__)
ItemT = TypeVar("ItemT")
OnFailed = Callable[[Exception], None]


class Lane(Generic[ItemT]):
    """One stream's items in order; made by `Outbox.lane`."""

    def __init__(
        self,
        ready: queue.SimpleQueue[Lane[ItemT] | None],
        flush: Callable[[list[ItemT]], None],
        on_failed: OnFailed | None,
    ) -> None:
        self._ready = ready
        self._flush = flush
        self._on_failed = on_failed
        self._has_failed = False
        self._lock = threading.Lock()
        self._items: list[ItemT] = []
        self._is_scheduled = False

    def put(self, item: ItemT) -> None:
        """Queue an item; thread-safe, never blocks."""
        with self._lock:
            self._items.append(item)
            if self._is_scheduled:
                return
            self._is_scheduled = True
        self._ready.put(self)

    def send_queued(self) -> None:
        """Called by the outbox thread alone."""
        with self._lock:
            items, self._items = self._items, []
            self._is_scheduled = False
        if self._has_failed:
            return
        try:
            self._flush(items)
        except Exception as error:
            _log.exception("a flush failed; its stream is lost, the others go on")
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._on_failed is not None:
            self._has_failed = True
            self._on_failed(error)


class Outbox(Generic[ItemT]):
    """The sending thread and its lanes."""

    def __init__(self, name: str) -> None:
        self._ready: queue.SimpleQueue[Lane[ItemT] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def lane(self, flush: Callable[[list[ItemT]], None], on_failed: OnFailed | None = None) -> Lane[ItemT]:
        """A new stream.

        Args:
            flush: Gets all items queued since its last call, in the outbox thread.
            on_failed: Called once, there too, with what `flush` raised; nothing is sent after it, because the stream
                has a hole. Without it nobody can be told, and the stream goes on.
        """
        return Lane(self._ready, flush, on_failed)

    def close(self) -> None:
        """Send what is queued and stop the thread."""
        self._ready.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (lane := self._ready.get()) is not None:
            try:
                lane.send_queued()
            except Exception:
                _log.exception("a stream's owner did not take its failure")
