"""Adaptive coalescing: sends what has queued up, at once when idle, together when behind.

A response costs the same CPU whatever it holds (about 145 us through Triton, 200 more per relay), so under load
several tokens must share one. No timer decides how many: one thread sends for all streams, and whatever a
stream gains while the thread is busy elsewhere goes out in that stream's next response.

Waking that thread takes as long as a response does. So what a client waits for, a first token, may be sent by whoever
has it, if nothing is ahead of it.
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

    def __init__(self, outbox: Outbox[ItemT], flush: Callable[[list[ItemT]], None], on_failed: OnFailed | None) -> None:
        self._outbox = outbox
        self._flush = flush
        self._on_failed = on_failed
        self._has_failed = False
        self._lock = threading.Lock()
        self._items: list[ItemT] = []
        self._is_scheduled = False

    def put(self, item: ItemT) -> None:
        """Queue an item; thread-safe, never blocks."""
        if self._queue(item):
            self._outbox.schedule(self)

    def add(self, item: ItemT) -> None:
        """Queue an item that another one follows at once: it goes out with that one, or before."""
        with self._lock:
            self._items.append(item)

    def send(self, item: ItemT) -> None:
        """Send an item from the calling thread if it is the next one due, which may block; queue it otherwise."""
        if not self._queue(item):
            return
        if self._outbox.is_idle:
            self.send_queued()
        else:
            self._outbox.schedule(self)

    def send_queued(self) -> None:
        """Called by whoever scheduled the lane, or took it from those that are: one thread at a time."""
        with self._lock:
            items, self._items = self._items, []
        try:
            if not self._has_failed:
                self._flush(items)
        except Exception as error:
            _log.exception("a flush failed; its stream is lost, the others go on")
            self._give_up(error)
        finally:
            self._let_go()

    def _queue(self, item: ItemT) -> bool:
        """Whether the caller is to have it sent; otherwise somebody does already."""
        with self._lock:
            self._items.append(item)
            was_scheduled, self._is_scheduled = self._is_scheduled, True
        return not was_scheduled

    def _let_go(self) -> None:
        with self._lock:
            self._is_scheduled = bool(self._items)
            is_due = self._is_scheduled
        if is_due:
            self._outbox.schedule(self)

    def _give_up(self, error: Exception) -> None:
        if self._on_failed is not None:
            self._has_failed = True
            self._on_failed(error)


class Outbox(Generic[ItemT]):
    """The sending thread and its lanes."""

    def __init__(self, name: str) -> None:
        self._ready: queue.SimpleQueue[Lane[ItemT] | None] = queue.SimpleQueue()
        self._is_sending = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether the thread has nothing to do, as far as can be told without a lock."""
        return not self._is_sending and self._ready.empty()

    def schedule(self, lane: Lane[ItemT]) -> None:
        """Have the thread send what a lane has; a lane is scheduled once at a time."""
        self._ready.put(lane)

    def lane(self, flush: Callable[[list[ItemT]], None], on_failed: OnFailed | None = None) -> Lane[ItemT]:
        """A new stream.

        Args:
            flush: Gets all items queued since its last call, in the outbox thread (or that of `Lane.send`).
            on_failed: Called once, there too, with what `flush` raised; nothing is sent after it, because the stream
                has a hole. Without it nobody can be told, and the stream goes on.
        """
        return Lane(self, flush, on_failed)

    def close(self) -> None:
        """Send what is queued and stop the thread."""
        self._ready.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (lane := self._ready.get()) is not None:
            self._is_sending = True
            try:
                lane.send_queued()
            except Exception:
                _log.exception("a stream's owner did not take its failure")
            self._is_sending = False
