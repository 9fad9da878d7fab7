"""What a router knows of the workers: the last good snapshot, whatever becomes of the registry."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kelp.core.types import WorkerState
from kelp.registry.base import Registry, WorkerRecord

_log = logging.getLogger(__name__)


class RegistryView:
    """A snapshot that refreshes itself.

    While the registry cannot be read the last snapshot stays in force: serving goes on, and broken streams tell
    which workers are really gone. All methods belong to one event loop.

    Attributes:
        on_read: Called after each new snapshot.
    """

    def __init__(self, registry: Registry, refresh_s: float) -> None:
        self._registry = registry
        self._refresh_s = refresh_s
        self._records: dict[str, WorkerRecord] = {}
        self._is_reachable = True
        self.on_read: Callable[[], None] = lambda: None

    async def run(self) -> None:
        """Refresh for ever; cancel to stop."""
        while True:
            try:
                await self.refresh()
            except Exception:
                # Whatever one record did to those who were told of it: the next snapshot may be better.
                _log.exception("the workers' records could not be taken over, trying again")
            await asyncio.sleep(self._refresh_s)

    async def refresh(self) -> None:
        """Read the registry once, off the loop."""
        try:
            records = await asyncio.to_thread(self._registry.snapshot)
        except OSError as error:
            if self._is_reachable:
                _log.warning("registry unreachable, serving from the last snapshot: %s", error)
            self._is_reachable = False
            return
        self._is_reachable = True
        self._records = {record.worker_id: record for record in records}
        self.on_read()

    def records(self) -> list[WorkerRecord]:
        """All known workers, in a stable order."""
        return sorted(self._records.values(), key=lambda record: record.worker_id)

    def ready(self) -> list[WorkerRecord]:
        """Workers that may get new requests, in a stable order."""
        return [record for record in self.records() if record.state is WorkerState.READY]

    def is_alive(self, worker_id: str, epoch: str) -> bool:
        """Whether this incarnation of a worker still renews its record."""
        record = self._records.get(worker_id)
        return record is not None and record.epoch == epoch
