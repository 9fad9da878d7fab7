"""All families by name."""

from __future__ import annotations

from fuzz.frame_families import DIRECT_CHANNEL, KV_EVENTS, KV_MANAGER, REPLICAS
from fuzz.parsers import Family
from fuzz.peer_families import HANDOFF, REGISTRY, WORKER_DOCUMENTS
from fuzz.request_family import REQUESTS
from fuzz.router_family import ROUTER_API
from fuzz.storage_families import STORAGE

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        WORKER_DOCUMENTS,
        HANDOFF,
        REGISTRY,
        DIRECT_CHANNEL,
        KV_MANAGER,
        KV_EVENTS,
        REPLICAS,
        REQUESTS,
        ROUTER_API,
        STORAGE,
    )
}
