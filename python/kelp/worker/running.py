"""The requests a worker runs, by the id under which a router may cancel them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from kelp.core.errors import KelpError

_MAX_EARLY = 1024
"""Cancellations kept for requests that have not come yet, or never will; the oldest are forgotten."""


class RunningRequests:
    """Belongs to one event loop.

    A cancellation travels on a stream of its own and may overtake the request it is meant for: then the request is
    cancelled as soon as it comes.
    """

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], str] = {}
        self._given_up: dict[asyncio.Task[Any], KelpError] = {}
        self._early: deque[str] = deque(maxlen=_MAX_EARLY)

    @contextmanager
    def running(self, request_id: str) -> Iterator[Callable[[], None]]:
        """While the block runs, `cancel` finds the task it runs in; yields what cancels that one, and nothing later.

        Raises:
            KelpError: The reason of `give_up`.
        """
        task = asyncio.current_task()
        assert task is not None
        if request_id in self._early:
            raise asyncio.CancelledError
        self._tasks[task] = request_id
        try:
            yield lambda: self._cancel_task(task)
        except asyncio.CancelledError:
            if task in self._given_up:
                raise self._given_up[task] from None
            raise
        finally:
            del self._tasks[task]
            self._given_up.pop(task, None)

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

    def give_up(self, reason: KelpError) -> None:
        """Let everything that runs end with `reason`."""
        for task in self._tasks:
            self._given_up.setdefault(task, reason)
            task.cancel()

    async def end_all(self, reason: KelpError) -> None:
        """Give everything up and wait until it has let go of what it holds."""
        self.give_up(reason)
        if self._tasks:
            await asyncio.wait(self._tasks.keys())


async def cancel_tasks(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have let go of what they hold."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
