"""The requests a worker runs, by the id under which a router may cancel them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")
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
    def running(self, request_id: str, work: Coroutine[Any, Any, ResultT]) -> Iterator[asyncio.Task[ResultT]]:
        """Run a request as a task that `cancel` finds."""
        task = asyncio.ensure_future(work)
        self._tasks[task] = request_id
        if request_id in self._early:
            task.cancel()
        try:
            yield task
        finally:
            del self._tasks[task]

    def cancel(self, request_id: str) -> None:
        """Cancel a request that runs or will come; one that has ended is left in peace."""
        found = [task for task, running_id in self._tasks.items() if running_id == request_id]
        for task in found:
            task.cancel()
        if not found:
            self._early.append(request_id)

    async def cancel_all(self) -> None:
        """Cancel everything and wait until it has let go of what it holds."""
        await cancel_tasks(self._tasks.keys())


async def cancel_tasks(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have let go of what they hold."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
