"""The standalone router's operations over a real selector and index, with two workers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kelp.core.clock import FakeClock
from kelp.core.config import RoutingConfig
from kelp.core.metrics import Metrics
from kelp.core.types import Role, WorkerState
from kelp.registry.base import KvManagerRecord, LayoutRecord, WorkerRecord
from kelp.registry.memory import MemoryRecords, MemoryRegistry
from kelp.router.api.messages import Dump, ManagerView
from kelp.router.api.operations import ApiParts, Operations
from kelp.router.api.reservations import Reservations
from kelp.router.decision.selector import Selector, SelectorMode
from kelp.router.decision.workers import WorkerTable
from kelp.router.index.kv_index import KVIndex
from kelp.router.ledger import Ledger
from kelp.router.replicas.loads import OwnLoads

BLOCK_SIZE = 4
LAYOUT = LayoutRecord(
    num_blocks=64, num_layers=1, num_kv_heads=1, block_size=BLOCK_SIZE, head_dim=2, dtype="float32", model_id="m"
)
EXPIRY_S = 5.0


def worker(name: str, **changes: object) -> WorkerRecord:
    fields: dict[str, object] = {
        "worker_id": f"host:1/{name}",
        "epoch": f"epoch of {name}",
        "model_name": name,
        "role": Role.AGGREGATED,
        "state": WorkerState.READY,
        "endpoint": "host:1",
        "layout": LAYOUT,
    }
    return WorkerRecord.model_validate({**fields, **changes})


@dataclass
class ApiRig:
    operations: Operations
    selector: Selector
    table: WorkerTable
    index: KVIndex
    clock: FakeClock
    registry: MemoryRegistry
    reservations: Reservations
    told: OwnLoads

    def call(self, name: str, **document: Any) -> dict[str, Any]:
        return dict(json.loads(self.operations.call(name, json.dumps(document).encode())))

    def register(self, *records: WorkerRecord) -> None:
        for record in records:
            self.call("register", worker=record.model_dump(mode="json"))


def _view(record: KvManagerRecord) -> ManagerView:
    return ManagerView(
        manager_id=record.manager_id, epoch=record.epoch, host=record.host, endpoint=record.endpoint, events="live"
    )


def api_rig() -> ApiRig:
    clock = FakeClock()
    table = WorkerTable()
    index = KVIndex(clock)
    selector = Selector(table, index, RoutingConfig(), clock, seed=1, mode=SelectorMode("kelp", "auto"))
    registry = MemoryRegistry(EXPIRY_S, clock)
    managers: MemoryRecords[KvManagerRecord] = MemoryRecords(EXPIRY_S, clock)
    told = OwnLoads("here", 1)
    ledger = Ledger(selector, told, "kelp", Metrics())
    reservations = Reservations(ledger, clock, RoutingConfig().reservation_ttl_s, RoutingConfig().lease_ttl_s)
    parts = ApiParts(
        selector=selector,
        table=table,
        reservations=reservations,
        registry=registry,
        managers=managers,
        view_managers=lambda: tuple(map(_view, managers.snapshot())),
        refresh=lambda: selector.set_workers(registry.snapshot()),
        dump=lambda _: Dump(requests=(), index={}, num_blocks={}),
        clock=clock,
    )
    return ApiRig(Operations(parts), selector, table, index, clock, registry, reservations, told)
