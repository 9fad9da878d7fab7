"""How a worker shows itself in the registry."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kelp.registry.base import Registry, WorkerRecord

_log = logging.getLogger(__name__)


class Presence:
    """Publishes the worker's record at every heartbeat, and at once when its state changes.

    A registry that cannot be reached is retried at the next heartbeat; the worker serves on.
    """

    def __init__(self, registry: Registry, describe: Callable[[], WorkerRecord], heartbeat_s: float) -> None:
        self._registry = registry
        self._describe = describe
        self._heartbeat_s = heartbeat_s
        self._is_reachable = True
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """Publish for ever; cancel to stop."""
        while True:
            await self.publish()
            await asyncio.sleep(self._heartbeat_s)

    async def publish(self) -> None:
        """Publish the present state."""
        try:
            await self._write(self._registry.publish, self._describe())
        except OSError as error:
            if self._is_reachable:
                _log.warning("registry unreachable, will retry: %s", error)
            self._is_reachable = False
            return
        self._is_reachable = True

    async def withdraw(self) -> None:
        """Leave the registry."""
        record = self._describe()
        try:
            await self._write(self._registry.withdraw, record.worker_id, record.epoch)
        except OSError as error:
            _log.warning("record %s not withdrawn, it expires: %s", record.worker_id, error)

    async def _write(self, write: Callable[..., None], *arguments: object) -> None:
        """One write at a time, and to its end: cancelled half-way, a late renewal would undo the withdrawal."""
        async with self._writing:
            in_thread = asyncio.ensure_future(asyncio.to_thread(write, *arguments))
            try:
                await asyncio.shield(in_thread)
            except asyncio.CancelledError:
                await asyncio.wait({in_thread})
                raise
