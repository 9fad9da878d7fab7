"""One thread for one tier: its calls may block, and one at a time is what a tier takes.

Work is done in the order in which it was asked for, so what is cleared first is cleared before it is written again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from kelp.core.errors import InternalError, KelpError
from kelp.kv.background import yield_to_others

_log = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await work that is never left half done, because slots in a thread's hands must not be given away.

    Whoever is cancelled while it waits is cancelled afterwards.
    """
    working = asyncio.ensure_future(work)
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        raise


class TierThread:
    """Runs a tier's calls; asked from one event loop.

    Args:
        can_wait: Nobody waits for these calls; see `kv.background`.

    Attributes:
        num_waiting: Calls that have not ended.
    """

    def __init__(self, name: str, can_wait: bool = False) -> None:
        begin = yield_to_others if can_wait else None
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=name, initializer=begin)
        self.num_waiting = 0

    def start(self, call: Callable[..., ResultT], *arguments: Any) -> asyncio.Future[ResultT]:
        """Run a call; whoever awaits it may go away, the call still ends."""
        self.num_waiting += 1
        running = asyncio.get_running_loop().run_in_executor(self._executor, call, *arguments)
        running.add_done_callback(self._ended)
        return running

    async def run(self, call: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """Run a call to its end.

        Raises:
            KelpError: What the call raised; InternalError for anything that it should not.
        """
        try:
            return await self.start(call, *arguments)
        except KelpError:
            raise
        except Exception as error:
            raise InternalError(f"KV tier: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Let what has been asked for end; blocks."""
        self._executor.shutdown(wait=True)

    def _ended(self, done: asyncio.Future[Any]) -> None:
        self.num_waiting -= 1
        error = None if done.cancelled() else done.exception()
        # What tiers say themselves is for whoever asked.
        if error is not None and not isinstance(error, KelpError):
            _log.error("a call of a KV tier failed", exc_info=error)
