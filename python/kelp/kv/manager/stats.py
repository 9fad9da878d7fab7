"""Counts of the manager: exported as metrics, and given to people and tests as they stand."""

from __future__ import annotations

from collections import defaultdict

from kelp.core import metrics as families
from kelp.core.metrics import MetricFamily, Metrics
from kelp.core.types import Tier
from kelp.kv.manager.shelf import Shelf
from kelp.kv.manager.states import SlotState
from kelp.kv.tiers.base import STORE_STATES, DiskTier, ObjectTier


class ManagerStats:
    """Adds up; belongs to one event loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._values: dict[str, float] = defaultdict(float)

    def add(self, family: MetricFamily, value: float = 1.0, **labels: str) -> None:
        """Count."""
        if value:
            self._metrics.add(family, value, **labels)
            self._values[_key(family, labels)] += value

    def set(self, family: MetricFamily, value: float, **labels: str) -> None:
        """Show how something stands."""
        self._metrics.set(family, value, **labels)
        self._values[_key(family, labels)] = value

    def reached(self, family: MetricFamily, total: float, **labels: str) -> None:
        """Somebody else's count has come to this."""
        self.add(family, total - self._values[_key(family, labels)], **labels)

    def disk(self, disk: DiskTier) -> None:
        """What the disk tier says of itself."""
        for kind, count in disk.events.items():
            self.reached(families.KV_TIER_EVENTS, count, tier="disk", kind=kind)

    def objects(self, objects: ObjectTier) -> None:
        """What the object tier says of itself; blocks that are merely gone are not corrupt."""
        events = objects.events
        for kind, count in events.items():
            self.reached(families.KV_TIER_EVENTS, count, tier="object", kind=kind)
        self.reached(families.KV_TIER_CORRUPT, events.get("damaged", 0), tier="object")
        for state in STORE_STATES:
            self.set(families.KV_STORE_STATE, float(objects.state == state), state=state)
        self.set(families.KV_STORE_BYTES, objects.stored_bytes)

    def moved(self, tier: Tier, direction: str, num_bytes: int, seconds: float) -> None:
        """One call of a tier took that long."""
        name = tier.name.lower()
        self.add(families.KV_TIER_MOVED, num_bytes, tier=name, direction=direction)
        self._metrics.observe(families.KV_TIER_SECONDS, seconds, tier=name, direction=direction)

    def shelf(self, tier: Tier, shelf: Shelf, block_bytes: int) -> None:
        """How full a tier is."""
        name = tier.name.lower()
        for state in SlotState:
            self.set(families.KV_TIER_BLOCKS, shelf.slots.count(state), tier=name, state=state.value)
        self.set(families.KV_TIER_BYTES, len(shelf) * block_bytes, tier=name)

    def values(self) -> dict[str, float]:
        """All counts by `name{label="value"}`."""
        return dict(self._values)


def _key(family: MetricFamily, labels: dict[str, str]) -> str:
    shown = ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))
    return f"{family.name}{{{shown}}}" if shown else family.name
