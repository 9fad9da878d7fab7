"""An event loop of our own in each stub.

Triton creates a loop lazily at the first async `execute`; a worker needs one from `initialize` on, for its registry
heartbeat and handoff service.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")
_BLOCKING_CALLS = 32


class LoopThread:
    """A running event loop in a daemon thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(_BLOCKING_CALLS, thread_name_prefix=name))
        self._arrived: deque[Coroutine[Any, Any, None]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        # Takes two thirds of what waking the loop by its own means does, and a lone request waits for it.
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._loop.add_reader(self._bell, self._start_arrived)
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        """Run a coroutine; thread-safe."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def launch(self, works: Sequence[Coroutine[Any, Any, None]]) -> None:
        """Run coroutines that nobody waits for, and that let no exception out; thread-safe, wakes the loop once."""
        self._arrived.extend(works)
        os.eventfd_write(self._bell, 1)

    def _start_arrived(self) -> None:
        os.eventfd_read(self._bell)
        while self._arrived:
            task = self._loop.create_task(self._arrived.popleft())
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def wait(self, work: Coroutine[Any, Any, ResultT], timeout_s: float | None = None) -> ResultT:
        """Run a coroutine and block for its result."""
        return self.start(work).result(timeout_s)

    def close(self) -> None:
        """Cancel what runs and stop the loop."""
        self.wait(_cancel_others(), timeout_s=10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10.0)
        if not self._thread.is_alive():
            self._loop.close()
            bell, self._bell = self._bell, -1
            os.close(bell)


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=5.0)
