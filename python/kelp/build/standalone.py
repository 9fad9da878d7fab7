"""`kelp router`: the decision alone."""

from __future__ import annotations

import asyncio
import socket
from itertools import islice

from kelp.core.clock import SystemClock
from kelp.core.config import KelpConfig
from kelp.core.errors import NotFound
from kelp.core.metrics import Metrics
from kelp.core.peer_auth import token_of_server
from kelp.core.types import Tier
from kelp.registry.access import open_registry
from kelp.registry.base import KvManagerRecord
from kelp.registry.memory import JoinedRecords, JoinedRegistry, MemoryRecords, MemoryRegistry
from kelp.registry.view import RecordsView, RegistryView
from kelp.router.api.exposition import Exposition
from kelp.router.api.messages import Dump, DumpRequest, ManagerView
from kelp.router.api.operations import ApiParts, Operations
from kelp.router.api.reservations import Reservations
from kelp.router.api.server import RouterServer
from kelp.router.index.sharing import shared_slot
from kelp.router.lower_tiers import LowerTiers
from kelp.router.stack import Registries, RoutingStack

_VIEW_REFRESHES_PER_HEARTBEAT = 4
_PAGE_BLOCKS = 16_384


def build_router_server(config: KelpConfig, name: str) -> RouterServer:
    """The server of `kelp router`; to be made on its event loop.

    Args:
        config: As for the `llm` model; workers are found in its registry, and may register themselves.
        name: Tells this router from others of the same workers on this host.
    """
    clock, metrics, token = SystemClock(), Metrics(), token_of_server(config.peers, "router")
    registry, expiry_s = open_registry(config.registry, token), config.registry.expiry_s
    registered = MemoryRegistry(expiry_s, clock)
    registered_managers: MemoryRecords[KvManagerRecord] = MemoryRecords(expiry_s, clock)
    registry.routers.sweep()
    refresh_s = config.registry.heartbeat_s / _VIEW_REFRESHES_PER_HEARTBEAT
    view = RegistryView(JoinedRegistry(registered, registry.workers), refresh_s, expiry_s)
    all_managers = JoinedRecords(registered_managers, registry.kv_managers)
    managers = RecordsView(all_managers.snapshot, refresh_s, expiry_s)
    registries = Registries(view, managers, registry.routers)
    stack = RoutingStack(config, f"{socket.gethostname()}/{name}", registries, clock, metrics, token)
    routing = config.routing
    reservations = Reservations(stack.ledger, clock, routing.reservation_ttl_s, routing.lease_ttl_s)
    parts = ApiParts(
        selector=stack.selector,
        table=stack.table,
        reservations=reservations,
        registry=registered,
        managers=registered_managers,
        view_managers=lambda: _view_managers(stack.lower_tiers),
        refresh=lambda: _soon(view, managers),
        dump=lambda asked: _dump(stack, reservations, asked),
        clock=clock,
    )
    return RouterServer(Operations(parts), stack, Exposition(metrics))


def _soon(*views: RegistryView | RecordsView[KvManagerRecord]) -> None:
    for view in views:
        refreshing = asyncio.ensure_future(view.refresh())
        refreshing.add_done_callback(lambda task: task.exception())


def _view_managers(lower_tiers: LowerTiers) -> tuple[ManagerView, ...]:
    managers = lower_tiers.managers
    return tuple(
        ManagerView(
            manager_id=(record := managers.record(number)).manager_id,
            epoch=record.epoch,
            host=record.host,
            endpoint=record.endpoint,
            events=lower_tiers.feed.state(number).value,
        )
        for number in managers.slots()
    )


def _dump(stack: RoutingStack, reservations: Reservations, asked: DumpRequest) -> Dump:
    index, table = stack.index, stack.table
    managers = stack.lower_tiers.managers
    slots = {table.record(slot).worker_id: slot for slot in table.slots()}
    slots |= {managers.record(number).manager_id: shared_slot(number) for number in managers.slots()}
    hashes: tuple[tuple[str, ...], ...] = ()
    if asked.worker_id:
        if asked.worker_id not in slots:
            raise NotFound(f"worker_id: {asked.worker_id!r} is not known; there are: {', '.join(slots) or 'none'}")
        slot, end = slots[asked.worker_id], asked.offset + _PAGE_BLOCKS
        hashes = tuple(
            tuple(name.hex() for name in islice(index.holdings(slot, tier), asked.offset, end)) for tier in Tier
        )
    return Dump(
        requests=reservations.request_ids,
        index={
            "num_blocks": index.num_blocks,
            "num_bytes": index.num_bytes,
            "num_approximate_workers": stack.num_approximate,
        },
        num_blocks={
            holder: tuple(sum(1 for _ in index.holdings(slot, tier)) for tier in Tier) for holder, slot in slots.items()
        },
        hashes=hashes,
    )
