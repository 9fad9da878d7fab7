"""How a process shows itself in a registry: published at every heartbeat, withdrawn at the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

_log = logging.getLogger(__name__)
RecordT = TypeVar("RecordT")


class Presence(Generic[RecordT]):
    """Publishes a record at every heartbeat, and at once when it is told to.

    A registry that cannot be reached is retried at the next heartbeat; whoever it is about serves on.

    Args:
        write: Creates or renews the record; blocks.
        remove: Removes it if it still is of the same incarnation; blocks.
        describe: The record as it is now.
    """

    def __init__(
        self,
        write: Callable[[RecordT], None],
        remove: Callable[[RecordT], None],
        describe: Callable[[], RecordT],
        heartbeat_s: float,
    ) -> None:
        self._write = write
        self._remove = remove
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
            await self._to_its_end(self._write)
        except OSError as error:
            if self._is_reachable:
                _log.warning("registry unreachable, will retry: %s", error)
            self._is_reachable = False
            return
        self._is_reachable = True

    async def withdraw(self) -> None:
        """Leave the registry."""
        try:
            await self._to_its_end(self._remove)
        except OSError as error:
            _log.warning("a record is not withdrawn, it expires: %s", error)

    async def _to_its_end(self, change: Callable[[RecordT], None]) -> None:
        """One write at a time, and to its end: cancelled half-way, a late renewal would undo the withdrawal."""
        async with self._writing:
            in_thread = asyncio.ensure_future(asyncio.to_thread(change, self._describe()))
            try:
                await asyncio.shield(in_thread)
            except asyncio.CancelledError:
                await asyncio.wait({in_thread})
                raise
