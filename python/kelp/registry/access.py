"""The registry that the configuration names: a directory, or an etcd."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from pydantic import TypeAdapter

from kelp.core.clock import SystemClock
from kelp.core.config_registry import RegistryConfig
from kelp.core.peer_auth import PeerToken
from kelp.registry.base import (
    KV_MANAGER_RECORD,
    ROUTER_RECORD,
    TRAFFIC_RECORD,
    WORKER_RECORD,
    KvManagerRecord,
    StampedRecord,
    TrafficRecord,
    WorkerRecord,
)
from kelp.registry.directory import DirectoryRegistry, KvManagerDirectory, RouterDirectory, TrafficDirectory
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
from kelp.registry.last_seen import LastSeen, NotedKind
from kelp.registry.record_seal import RecordSeal
from kelp.registry.store import NEVER_S

RecordT = TypeVar("RecordT", bound=StampedRecord)
NOTED_WORKERS = NotedKind(
    WORKER_SUFFIX,
    WORKER_RECORD,
    lambda it: (it.key, it.state, it.kv_manager_id),
    # A load without a heartbeat after it would count for as long as the registry is away.
    lambda it: it.model_copy(update={"num_running": 0, "num_waiting": 0}),
)
_NOTED_MANAGERS = NotedKind(KV_MANAGER_SUFFIX, KV_MANAGER_RECORD, lambda it: it.key, lambda it: it)
_NOTED_TRAFFIC = NotedKind(TRAFFIC_SUFFIX, TRAFFIC_RECORD, lambda it: tuple(it.shares.items()), lambda it: it)


class RegistryAccess(NamedTuple):
    """Where each kind of record is."""

    workers: WorkerRecords
    routers: RouterRecords
    kv_managers: KvManagerRecords
    traffic: TrafficRecords


def open_registry(config: RegistryConfig, token: PeerToken | None) -> RegistryAccess:
    """The registry; nothing is asked of it yet, and it may be away.

    Args:
        config: Which one.
        token: What whoever writes there knows; None: anybody's records count.

    Raises:
        ConfigError: A file that it names cannot be read.
    """
    if config.etcd is not None:
        return _open_etcd(config, token)
    folder, expiry_s = config.path, config.expiry_s
    return RegistryAccess(
        DirectoryRegistry(folder, expiry_s, token=token),
        RouterDirectory(folder, expiry_s, token=token),
        KvManagerDirectory(folder, expiry_s, token=token),
        TrafficDirectory(folder, token=token),
    )


class RegistryMemory(NamedTuple):
    """What a router notes of each kind of record."""

    workers: LastSeen[WorkerRecord]
    kv_managers: LastSeen[KvManagerRecord]
    traffic: LastSeen[TrafficRecord]


def open_memory(config: RegistryConfig, token: PeerToken | None) -> RegistryMemory:
    """What routers of this host know of the registry while it is away; see `registry.last_seen`."""
    folder = config.last_seen_path or config.path.with_name(f"{config.path.name}-last-seen")
    registry = config.url or str(config.path.absolute())

    def notes(kind: NotedKind[RecordT]) -> LastSeen[RecordT]:
        return LastSeen(folder, registry, kind, token, SystemClock())

    return RegistryMemory(notes(NOTED_WORKERS), notes(_NOTED_MANAGERS), notes(_NOTED_TRAFFIC))


def _open_etcd(config: RegistryConfig, token: PeerToken | None) -> RegistryAccess:
    # Here, because a single host need not pay for importing gRPC.
    from kelp.registry.etcd import EtcdRecords
    from kelp.registry.etcd_client import EtcdClient

    address = config.etcd
    assert address is not None, "asked for by open_registry"
    client, prefix = EtcdClient(config, address), address.prefix

    def records(
        kind: str, suffix: str, adapter: TypeAdapter[RecordT], expiry_s: float = config.expiry_s
    ) -> EtcdRecords[RecordT]:
        seal = RecordSeal(suffix, adapter, token)
        return EtcdRecords(client, f"{prefix}/{kind}/", seal, expiry_s, SystemClock())

    return RegistryAccess(
        WorkerRecords(records("workers", WORKER_SUFFIX, WORKER_RECORD)),
        RouterRecords(records("routers", ROUTER_SUFFIX, ROUTER_RECORD)),
        KvManagerRecords(records("kv-managers", KV_MANAGER_SUFFIX, KV_MANAGER_RECORD)),
        TrafficRecords(records("traffic", TRAFFIC_SUFFIX, TRAFFIC_RECORD, NEVER_S)),
    )
