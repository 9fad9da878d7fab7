"""How a worker shows itself in the registry."""

from __future__ import annotations

from collections.abc import Callable

from kelp.registry import presence
from kelp.registry.base import Registry, WorkerRecord


class Presence(presence.Presence[WorkerRecord]):
    """Publishes the worker's record at every heartbeat, and at once when its state changes."""

    def __init__(self, registry: Registry, describe: Callable[[], WorkerRecord], heartbeat_s: float) -> None:
        def remove(record: WorkerRecord) -> None:
            registry.withdraw(record.worker_id, record.epoch)

        super().__init__(registry.publish, remove, describe, heartbeat_s)
