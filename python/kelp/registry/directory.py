"""Registries of one host: a directory with one JSON file per worker, router and KV block manager.

A record whose heartbeat is older than `expiry_s` is dead; a starting worker or router sweeps such files away. With a
token, records that no peer wrote do not count (`registry.record_folder`).
"""

from __future__ import annotations

from pathlib import Path

from kelp.core.clock import Clock, SystemClock
from kelp.core.peer_auth import PeerToken
from kelp.registry.base import (
    KV_MANAGER_RECORD,
    ROUTER_RECORD,
    WORKER_RECORD,
    KvManagerRecord,
    RouterRecord,
    WorkerRecord,
)
from kelp.registry.record_folder import RecordFolder

_WORKER_SUFFIX = ".worker.json"
_ROUTER_SUFFIX = ".router.json"
_KV_MANAGER_SUFFIX = ".kv-manager.json"


class DirectoryRegistry:
    """See the module docstring; implements `registry.base.Registry`."""

    def __init__(
        self, folder: Path, expiry_s: float, clock: Clock | None = None, token: PeerToken | None = None
    ) -> None:
        self._records = RecordFolder(folder, _WORKER_SUFFIX, WORKER_RECORD, expiry_s, clock or SystemClock(), token)

    def publish(self, record: WorkerRecord) -> None:
        """See `Registry`; stamps the heartbeat."""
        self._records.write(record.worker_id, record)

    def withdraw(self, worker_id: str, epoch: str) -> None:
        """See `Registry`."""
        record = self._records.read(worker_id)
        if record is not None and record.epoch == epoch:
            self._records.remove(worker_id)

    def snapshot(self) -> list[WorkerRecord]:
        """See `Registry`; a missing directory is an empty registry."""
        return self._records.live()

    def sweep(self) -> int:
        """Remove the records of dead workers and return how many there were."""
        return self._records.sweep()


class RouterDirectory:
    """Routers in the same directory; implements `registry.base.RouterRegistry`."""

    def __init__(
        self, folder: Path, expiry_s: float, clock: Clock | None = None, token: PeerToken | None = None
    ) -> None:
        self._records = RecordFolder(folder, _ROUTER_SUFFIX, ROUTER_RECORD, expiry_s, clock or SystemClock(), token)

    def publish(self, record: RouterRecord) -> None:
        """See `RouterRegistry`; stamps the heartbeat. Leaves a later incarnation's record as long as that lives.

        A router that is loaded again runs beside its successor until its last request has ended.
        """
        live = self._records.live()
        if not any(other.router_id == record.router_id and other.epoch > record.epoch for other in live):
            self._records.write(record.router_id, record)

    def withdraw(self, router_id: str, epoch: int) -> None:
        """See `RouterRegistry`."""
        record = self._records.read(router_id)
        if record is not None and record.epoch == epoch:
            self._records.remove(router_id)

    def snapshot(self) -> list[RouterRecord]:
        """See `RouterRegistry`."""
        return self._records.live()

    def sweep(self) -> int:
        """Remove the records of dead routers and return how many there were."""
        return self._records.sweep()


class KvManagerDirectory:
    """KV block managers in the same directory."""

    def __init__(
        self, folder: Path, expiry_s: float, clock: Clock | None = None, token: PeerToken | None = None
    ) -> None:
        self._records = RecordFolder(
            folder, _KV_MANAGER_SUFFIX, KV_MANAGER_RECORD, expiry_s, clock or SystemClock(), token
        )

    def publish(self, record: KvManagerRecord) -> None:
        """Create or renew a record; stamps the heartbeat.

        Raises:
            OSError: The directory cannot be written.
        """
        self._records.write(record.manager_id, record)

    def withdraw(self, manager_id: str, epoch: str) -> None:
        """Remove the record if it still is of this epoch; idempotent."""
        record = self._records.read(manager_id)
        if record is not None and record.epoch == epoch:
            self._records.remove(manager_id)

    def snapshot(self) -> list[KvManagerRecord]:
        """All live records.

        Raises:
            OSError: The directory cannot be read.
        """
        return self._records.live()

    def sweep(self) -> int:
        """Remove the records of dead managers and return how many there were."""
        return self._records.sweep()
