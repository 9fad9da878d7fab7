"""Registries of one host: a directory with one JSON file per worker, router and KV block manager.

A record whose heartbeat is older than `expiry_s` is dead; a starting worker or router sweeps such files away. With a
token, records that no peer wrote do not count (`registry.record_seal`).
"""

from __future__ import annotations

from pathlib import Path

from kelp.core.clock import Clock, SystemClock
from kelp.core.peer_auth import PeerToken
from kelp.registry.base import KV_MANAGER_RECORD, ROUTER_RECORD, TRAFFIC_RECORD, WORKER_RECORD
from kelp.registry.kinds import (
    KV_MANAGER_SUFFIX,
    ROUTER_SUFFIX,
    TRAFFIC_SUFFIX,
    WORKER_SUFFIX,
    KvManagerRecords,
    RouterRecords,
    TrafficRecords,
    WorkerRecords,
)
from kelp.registry.record_folder import RecordFolder
from kelp.registry.store import NEVER_S


class DirectoryRegistry(WorkerRecords):
    """Workers in a directory; a missing one is an empty registry."""

    def __init__(
        self, folder: Path, expiry_s: float, clock: Clock | None = None, token: PeerToken | None = None
    ) -> None:
        super().__init__(RecordFolder(folder, WORKER_SUFFIX, WORKER_RECORD, expiry_s, clock or SystemClock(), token))


class RouterDirectory(RouterRecords):
    """Routers in the same directory."""

    def __init__(
        self, folder: Path, expiry_s: float, clock: Clock | None = None, token: PeerToken | None = None
    ) -> None:
        super().__init__(RecordFolder(folder, ROUTER_SUFFIX, ROUTER_RECORD, expiry_s, clock or SystemClock(), token))


class KvManagerDirectory(KvManagerRecords):
    """KV block managers in the same directory."""

    def __init__(
        self, folder: Path, expiry_s: float, clock: Clock | None = None, token: PeerToken | None = None
    ) -> None:
        super().__init__(
            RecordFolder(folder, KV_MANAGER_SUFFIX, KV_MANAGER_RECORD, expiry_s, clock or SystemClock(), token)
        )


class TrafficDirectory(TrafficRecords):
    """Shares of versions in the same directory."""

    def __init__(self, folder: Path, clock: Clock | None = None, token: PeerToken | None = None) -> None:
        store = RecordFolder(folder, TRAFFIC_SUFFIX, TRAFFIC_RECORD, NEVER_S, clock or SystemClock(), token)
        super().__init__(store)
