"""READs from the manager's slots into reserved blocks, and the certainty that none of them writes any more."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Sequence

from kelp.core.types import BlockId
from kelp.kv.handoff.reads import Read, ReadLoop
from kelp.worker.tiers.link import Link


class SlotReads:
    """READs of one onboarding; belongs to one event loop.

    Args:
        drop: Disconnects from the manager's memory, which alone ends a READ that failed.
    """

    def __init__(self, link: Link, reads: ReadLoop, drop: Callable[[Link], asyncio.Task[None]]) -> None:
        self._link = link
        self._reads = reads
        self._drop = drop
        self._loop = asyncio.get_running_loop()
        self._open: set[concurrent.futures.Future[float]] = set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._has_failed = False

    async def read(self, slots: Sequence[int], block_ids: Sequence[BlockId]) -> float:
        """READ slots into blocks, pairwise; returns the monotonic time at which they were seen to be complete.

        Cancelling the caller does not stop the READ: `stop` does.

        Raises:
            KelpError: The blocks may still be written to until `stop` has returned.
        """
        read = Read(self._link.peer, [BlockId(slot) for slot in slots], block_ids)
        self._open.add(read.finished)
        self._is_idle.clear()
        read.finished.add_done_callback(lambda done: self._loop.call_soon_threadsafe(self._settle, done))
        self._reads.submit(read)
        return await asyncio.shield(asyncio.wrap_future(read.finished))

    async def stop(self) -> None:
        """Returns when nothing writes into the blocks any more; may take for ever, so await it in a task."""
        for finished in list(self._open):
            finished.cancel()
        await self._is_idle.wait()
        if self._has_failed:
            await asyncio.wait({self._drop(self._link)})

    def _settle(self, finished: concurrent.futures.Future[float]) -> None:
        self._open.discard(finished)
        if not self._open:
            self._is_idle.set()
        self._has_failed |= not finished.cancelled() and finished.exception() is not None
