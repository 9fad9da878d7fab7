"""Workers that register with one process by calling it, instead of writing where everybody reads; alone or beside."""

from __future__ import annotations

import threading

from kelp.core.clock import Clock
from kelp.registry.base import Registry, WorkerRecord


class MemoryRegistry:
    """Records in memory, each with a lease that its worker renews; implements `registry.base.Registry`."""

    def __init__(self, expiry_s: float, clock: Clock) -> None:
        self._expiry_s = expiry_s
        self._clock = clock
        self._lock = threading.Lock()
        self._records: dict[str, tuple[WorkerRecord, float]] = {}

    def publish(self, record: WorkerRecord) -> None:
        """See `Registry`."""
        with self._lock:
            self._records[record.worker_id] = (record, self._clock.monotonic_s() + self._expiry_s)

    def withdraw(self, worker_id: str, epoch: str) -> None:
        """See `Registry`."""
        with self._lock:
            if worker_id in self._records and self._records[worker_id][0].epoch == epoch:
                del self._records[worker_id]

    def snapshot(self) -> list[WorkerRecord]:
        """See `Registry`."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            self._records = {key: entry for key, entry in self._records.items() if entry[1] > now_s}
            return [record for record, _ in self._records.values()]


class JoinedRegistry:
    """Reads two registries as one; of two records of a worker the first registry's counts. Writes go to that one."""

    def __init__(self, first: Registry, second: Registry) -> None:
        self._first = first
        self._second = second

    def publish(self, record: WorkerRecord) -> None:
        """See `Registry`."""
        self._first.publish(record)

    def withdraw(self, worker_id: str, epoch: str) -> None:
        """See `Registry`."""
        self._first.withdraw(worker_id, epoch)

    def snapshot(self) -> list[WorkerRecord]:
        """See `Registry`."""
        by_id = {record.worker_id: record for record in self._second.snapshot()}
        by_id.update({record.worker_id: record for record in self._first.snapshot()})
        return list(by_id.values())
