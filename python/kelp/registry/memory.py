"""Records that others hand in by calling this process, instead of writing them where everybody reads."""

from __future__ import annotations

import threading
from typing import Generic, Protocol, TypeVar

from kelp.core.clock import Clock
from kelp.registry.base import Incarnation, WorkerRecord

RecordT = TypeVar("RecordT", bound=Incarnation)


class Records(Protocol[RecordT]):
    """Any registry of one kind of record: `registry.base.Registry` for one."""

    def publish(self, record: RecordT) -> None:
        """Create or renew a record."""

    def withdraw(self, name: str, epoch: str, /) -> None:
        """Remove the record if it still is of this epoch; idempotent."""

    def snapshot(self) -> list[RecordT]:
        """All live records."""


class MemoryRecords(Generic[RecordT]):
    """Records in memory, each with a lease that whoever it is about renews; implements `Records`."""

    def __init__(self, expiry_s: float, clock: Clock) -> None:
        self._expiry_s = expiry_s
        self._clock = clock
        self._lock = threading.Lock()
        self._records: dict[str, tuple[RecordT, float]] = {}

    def publish(self, record: RecordT) -> None:
        """See `Records`."""
        with self._lock:
            self._records[record.key[0]] = (record, self._clock.monotonic_s() + self._expiry_s)

    def withdraw(self, name: str, epoch: str, /) -> None:
        """See `Records`."""
        with self._lock:
            if name in self._records and self._records[name][0].key[1] == epoch:
                del self._records[name]

    def snapshot(self) -> list[RecordT]:
        """See `Records`."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            self._records = {key: entry for key, entry in self._records.items() if entry[1] > now_s}
            return [record for record, _ in self._records.values()]


class JoinedRecords(Generic[RecordT]):
    """Reads two registries as one; of two records of one name the first registry's counts. Writes go to that one."""

    def __init__(self, first: Records[RecordT], second: Records[RecordT]) -> None:
        self._first = first
        self._second = second

    def publish(self, record: RecordT) -> None:
        """See `Records`."""
        self._first.publish(record)

    def withdraw(self, name: str, epoch: str, /) -> None:
        """See `Records`."""
        self._first.withdraw(name, epoch)

    def snapshot(self) -> list[RecordT]:
        """See `Records`."""
        by_name = {record.key[0]: record for record in self._second.snapshot()}
        by_name.update({record.key[0]: record for record in self._first.snapshot()})
        return list(by_name.values())


class MemoryRegistry(MemoryRecords[WorkerRecord]):
    """Workers; implements `registry.base.Registry`."""


class JoinedRegistry(JoinedRecords[WorkerRecord]):
    """Workers; implements `registry.base.Registry`."""
