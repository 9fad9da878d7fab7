"""What a router knows of workers and block managers: the last good snapshot, whatever becomes of the registry."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from kelp.core.clock import Clock, SystemClock
from kelp.core.types import WorkerState
from kelp.registry.base import Incarnation, Registry, WorkerRecord

_log = logging.getLogger(__name__)
RecordT = TypeVar("RecordT", bound=Incarnation)


class Memory(Protocol[RecordT]):
    """What a registry said last, beyond the end of a process (`registry.last_seen`). Calls block."""

    def is_news(self, records: Sequence[RecordT]) -> bool:
        """Whether these should be noted; does not block."""

    def note(self, records: Sequence[RecordT]) -> None:
        """Write them in place of those before."""

    def recall(self) -> list[RecordT]:
        """What was noted last."""


class RecordsView(Generic[RecordT]):
    """A snapshot of records of one kind that refreshes itself.

    While the registry cannot be read the last snapshot stays in force: serving goes on, and broken streams tell
    which workers are really gone. When it is back, what it lacks counts for a while longer: nobody could renew a record
    meanwhile, and many have expired that are about to be renewed. All methods belong to one event loop.

    Attributes:
        on_read: Called after each new snapshot.

    Args:
        read: The registry's own snapshot, which may block; raises OSError while it cannot be had.
        grace_s: How long after an outage what was known before still counts.
        memory: Where to start from while the registry has never been read; None: from nothing.
    """

    def __init__(
        self,
        read: Callable[[], Sequence[RecordT]],
        refresh_s: float,
        grace_s: float = 0.0,
        clock: Clock | None = None,
        memory: Memory[RecordT] | None = None,
    ) -> None:
        self._read_records = read
        self._refresh_s = refresh_s
        self._grace_s = grace_s
        self._clock = clock or SystemClock()
        self._grace_ends_s = -math.inf
        self._records: dict[str, RecordT] = {}
        self._memory = memory
        self._is_reachable = True
        self._may_recall = memory is not None
        self._noting: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self.on_read: Callable[[], None] = lambda: None

    async def run(self) -> None:
        """Refresh for ever; cancel to stop."""
        try:
            while True:
                try:
                    await self.refresh()
                except Exception:
                    # Whatever one record did to those who were told of it: the next snapshot may be better.
                    _log.exception("the registry's records could not be taken over, trying again")
                await asyncio.sleep(self._refresh_s)
        finally:
            for task in filter(None, (self._following, self._reading, self._noting)):
                task.cancel()

    async def refresh(self) -> None:
        """Read the registry once, off the loop; all who ask while it is being read share the reading that follows.

        Two readings at once could end in the wrong order, and bring back a worker that has gone.
        """
        await asyncio.shield(self._next_reading())

    def _next_reading(self) -> asyncio.Task[None]:
        if self._following is not None:
            return self._following
        if self._reading is None or self._reading.done():
            self._reading = asyncio.ensure_future(self._read())
            return self._reading
        self._following = asyncio.ensure_future(self._read_after(self._reading))
        return self._following

    async def _read_after(self, reading: asyncio.Task[None]) -> None:
        await asyncio.wait({reading})
        self._reading, self._following = self._following, None
        await self._read()

    async def _read(self) -> None:
        try:
            records = await asyncio.to_thread(self._read_records)
        except OSError as error:
            if self._is_reachable:
                _log.warning("registry unreachable, serving from the last snapshot: %s", error)
            self._is_reachable = False
            await self._recall()
            return
        self._may_recall = False
        now_s = self._clock.monotonic_s()
        if not self._is_reachable:
            self._is_reachable, self._grace_ends_s = True, now_s + self._grace_s
        known = self._records if now_s < self._grace_ends_s else {}
        self._records = {**known, **{record.key[0]: record for record in records}}
        self._note()
        self.on_read()

    def _note(self) -> None:
        """Beside the reading: a disk that hangs must not keep the registry's news away."""
        records = self.records()
        if self._memory is None or (self._noting is not None and not self._noting.done()):
            return
        if self._memory.is_news(records):
            self._noting = asyncio.ensure_future(asyncio.to_thread(self._memory.note, records))

    async def _recall(self) -> None:
        """Start from what an earlier process knew."""
        if self._memory is None or not self._may_recall:
            return
        self._may_recall = False
        records = await asyncio.to_thread(self._memory.recall)
        if records:
            _log.warning("starting from what the registry said last: %s", ", ".join(each.key[0] for each in records))
            self._records = {record.key[0]: record for record in records}
            self.on_read()

    def records(self) -> list[RecordT]:
        """All that are known, in a stable order: by id."""
        return [record for _, record in sorted(self._records.items())]


class RegistryView(RecordsView[WorkerRecord]):
    """The workers."""

    def __init__(
        self,
        registry: Registry,
        refresh_s: float,
        grace_s: float = 0.0,
        clock: Clock | None = None,
        memory: Memory[WorkerRecord] | None = None,
    ) -> None:
        super().__init__(registry.snapshot, refresh_s, grace_s, clock, memory)

    def ready(self) -> list[WorkerRecord]:
        """Workers that may get new requests, in a stable order."""
        return [record for record in self.records() if record.state is WorkerState.READY]

    def is_alive(self, worker_id: str, epoch: str) -> bool:
        """Whether this incarnation of a worker still renews its record."""
        record = self._records.get(worker_id)
        return record is not None and record.epoch == epoch
