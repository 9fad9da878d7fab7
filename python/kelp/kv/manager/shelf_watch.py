"""What a shelf is given: bounds, and somebody to tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kelp.kv.tiers.base import BlockRecord


class ShelfWatch(Protocol):
    """Who is told of changes, while they happen: must not call back into the shelf."""

    def arrived(self, record: BlockRecord) -> None:
        """The block can be found."""

    def left(self, record: BlockRecord, reason: str) -> None:
        """The block can no longer be found: `evicted`, `cleared` or `corrupt`."""

    def wipe(self, slot: int) -> None:
        """The slot's bytes must be overwritten, then `Shelf.wiped`."""


@dataclass(frozen=True, slots=True)
class ShelfLimits:
    """Shares of the slots: of one tenant, and of pinned blocks."""

    tenant_share: float = 1.0
    max_pinned_share: float = 0.5
