"""The registry that the configuration names: a directory, or an etcd."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from pydantic import TypeAdapter

from kelp.core.clock import SystemClock
from kelp.core.config_registry import RegistryConfig
from kelp.core.peer_auth import PeerToken
from kelp.registry.base import KV_MANAGER_RECORD, ROUTER_RECORD, TRAFFIC_RECORD, WORKER_RECORD, StampedRecord
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
from kelp.registry.record_seal import RecordSeal
from kelp.registry.store import NEVER_S

RecordT = TypeVar("RecordT", bound=StampedRecord)


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
