"""What a worker is made of, and who it is."""

from __future__ import annotations

from dataclasses import dataclass

from kelp.core.clock import Clock
from kelp.core.metrics import Metrics
from kelp.core.peer_auth import PeerToken
from kelp.core.types import Role
from kelp.executor.base import Executor
from kelp.kv.events import EventPublisher
from kelp.kv.handoff import HandoffReader, HandoffServer
from kelp.registry.base import Registry
from kelp.transport.base import Agent
from kelp.worker.tiers import WorkerTiers


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker is made of; `build.py` puts it together.

    Without `events` routers guess what it holds; without `tiers` what its cache evicts is lost; without `token` whoever
    reaches it may give commands.
    """

    executor: Executor
    handoffs: HandoffServer
    reader: HandoffReader
    agent: Agent
    registry: Registry
    clock: Clock
    metrics: Metrics
    events: EventPublisher | None = None
    tiers: WorkerTiers | None = None
    token: PeerToken | None = None


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Who this worker is; `epoch` is new with every incarnation.

    Attributes:
        text_id: `core.model_identity.text_identity` of its model.
    """

    model_name: str
    role: Role
    endpoint: str
    epoch: str
    text_id: str = ""

    @property
    def worker_id(self) -> str:
        """Name in the registry, stable over restarts."""
        return f"{self.endpoint}/{self.model_name}"
