"""The requests a worker runs, by the id under which a router may cancel them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

_MAX_EARLY = 1024
"""Cancellations kept for requests that have not come yet, or never will; the oldest are forgotten."""


class RunningRequests:
    """Belongs to one event loop.

    A cancellation travels on a stream of its own and may overtake the request it is meant for: then the request is
    cancelled as soon as it comes.
    """

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], str] = {}
        self._early: deque[str] = deque(maxlen=_MAX_EARLY)

    @contextmanager
    def running(self, request_id: str) -> Iterator[Callable[[], None]]:
        """While the block runs, `cancel` finds the task it runs in; yields what cancels that one, and nothing later."""
        task = asyncio.current_task()
        assert task is not None
        if request_id in self._early:
            raise asyncio.CancelledError
        self._tasks[task] = request_id
        try:
            yield lambda: self._cancel_task(task)
        finally:
            del self._tasks[task]

    def cancel(self, request_id: str) -> None:
        """Cancel a request that runs or will come; one that has ended is left in peace."""
        found = [task for task, running_id in self._tasks.items() if running_id == request_id]
        for task in found:
            task.cancel()
        if not found:
            self._early.append(request_id)

    def _cancel_task(self, task: asyncio.Task[Any]) -> None:
        if task in self._tasks:
            task.cancel()

    async def cancel_all(self) -> None:
        """Cancel everything and wait until it has let go of what it holds."""
        await cancel_tasks(self._tasks.keys())


async def cancel_tasks(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have let go of what they hold."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
