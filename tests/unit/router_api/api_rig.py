"""The standalone router's operations over a real selector and index, with two workers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kelp.core.clock import FakeClock
from kelp.core.config import RoutingConfig
from kelp.core.metrics import Metrics
from kelp.core.types import Role, WorkerState
from kelp.registry.base import LayoutRecord, WorkerRecord
from kelp.registry.memory import MemoryRegistry
from kelp.router.api.messages import Dump
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

    def call(self, name: str, **document: Any) -> dict[str, Any]:
        return dict(json.loads(self.operations.call(name, json.dumps(document).encode())))

    def register(self, *records: WorkerRecord) -> None:
        for record in records:
            self.call("register", worker=record.model_dump(mode="json"))


def api_rig() -> ApiRig:
    clock = FakeClock()
    table = WorkerTable()
    index = KVIndex(clock)
    selector = Selector(table, index, RoutingConfig(), clock, seed=1, mode=SelectorMode("kelp", "auto"))
    registry = MemoryRegistry(EXPIRY_S, clock)
    ledger = Ledger(selector, OwnLoads("here", 1), "kelp", Metrics())
    parts = ApiParts(
        selector=selector,
        table=table,
        reservations=Reservations(ledger, clock, RoutingConfig().reservation_ttl_s, RoutingConfig().lease_ttl_s),
        registry=registry,
        refresh=lambda: selector.set_workers(registry.snapshot()),
        dump=lambda _: Dump(requests=(), index={}, num_blocks={}),
        clock=clock,
    )
    return ApiRig(Operations(parts), selector, table, index, clock, registry)
