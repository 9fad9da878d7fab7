"""The kinds of records, and what is particular to each, over any store."""

from __future__ import annotations

from kelp.registry.base import KvManagerRecord, RouterRecord, TrafficRecord, WorkerRecord
from kelp.registry.store import RecordStore

WORKER_SUFFIX = ".worker.json"
ROUTER_SUFFIX = ".router.json"
KV_MANAGER_SUFFIX = ".kv-manager.json"
TRAFFIC_SUFFIX = ".traffic.json"
_TRAFFIC = "traffic"


class WorkerRecords:
    """Workers; implements `registry.base.Registry`."""

    def __init__(self, store: RecordStore[WorkerRecord]) -> None:
        self._records = store

    def publish(self, record: WorkerRecord) -> None:
        """See `Registry`; stamps the heartbeat."""
        self._records.write(record.worker_id, record)

    def withdraw(self, worker_id: str, epoch: str) -> None:
        """See `Registry`."""
        self._records.remove_if(worker_id, lambda record: record.epoch == epoch)

    def snapshot(self) -> list[WorkerRecord]:
        """See `Registry`."""
        return self._records.live()

    def sweep(self) -> int:
        """Remove the records of dead workers and return how many there were."""
        return self._records.sweep()


class RouterRecords:
    """Routers; implements `registry.base.RouterRegistry`."""

    def __init__(self, store: RecordStore[RouterRecord]) -> None:
        self._records = store

    def publish(self, record: RouterRecord) -> None:
        """See `RouterRegistry`; stamps the heartbeat. Leaves a later incarnation's record as long as that lives.

        A router that is loaded again runs beside its successor until its last request has ended.
        """
        live = self._records.live()
        if not any(other.router_id == record.router_id and other.epoch > record.epoch for other in live):
            self._records.write(record.router_id, record)

    def withdraw(self, router_id: str, epoch: int) -> None:
        """See `RouterRegistry`."""
        self._records.remove_if(router_id, lambda record: record.epoch == epoch)

    def snapshot(self) -> list[RouterRecord]:
        """See `RouterRegistry`."""
        return self._records.live()

    def sweep(self) -> int:
        """Remove the records of dead routers and return how many there were."""
        return self._records.sweep()


class KvManagerRecords:
    """KV block managers."""

    def __init__(self, store: RecordStore[KvManagerRecord]) -> None:
        self._records = store

    def publish(self, record: KvManagerRecord) -> None:
        """Create or renew a record; stamps the heartbeat.

        Raises:
            OSError: The registry cannot be reached.
        """
        self._records.write(record.manager_id, record)

    def withdraw(self, manager_id: str, epoch: str) -> None:
        """Remove the record if it still is of this epoch; idempotent."""
        self._records.remove_if(manager_id, lambda record: record.epoch == epoch)

    def snapshot(self) -> list[KvManagerRecord]:
        """All live records.

        Raises:
            OSError: The registry cannot be reached.
        """
        return self._records.live()

    def sweep(self) -> int:
        """Remove the records of dead managers and return how many there were."""
        return self._records.sweep()


class TrafficRecords:
    """The one record of how requests are shared among versions."""

    def __init__(self, store: RecordStore[TrafficRecord]) -> None:
        self._records = store

    def set(self, record: TrafficRecord) -> None:
        """Replace it.

        Raises:
            OSError: The registry cannot be reached.
        """
        self._records.write(_TRAFFIC, record)

    def snapshot(self) -> list[TrafficRecord]:
        """The record, if there is one.

        Raises:
            OSError: The registry cannot be reached.
        """
        return self._records.live()
