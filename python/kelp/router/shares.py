"""What each tenant has had of the places for which others waited as well: virtual time, as in weighted fair queueing.

A tenant that comes, or comes back, starts where the least served of those who wait is: nobody saves up, and nobody who
was away has to catch up.
"""

from __future__ import annotations

from collections.abc import Set

_MAX_IDLE = 64


class Shares:
    """Belongs to one thread."""

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        self._floor = 0.0

    def start(self, tenant: str) -> float:
        """Whoever has least goes first."""
        return max(self._floor, self._had.get(tenant, 0.0))

    def charge(self, tenant: str, cost: float, waiting: Set[str]) -> None:
        """A tenant got a place.

        Args:
            tenant: Who.
            cost: What it is worth.
            waiting: Tenants who still wait.
        """
        self._had[tenant] = self.start(tenant) + cost
        if waiting:
            self._floor = min(map(self.start, waiting))
        if len(self._had) > len(waiting) + _MAX_IDLE:
            self._had = {name: had for name, had in self._had.items() if had > self._floor}

    def clear(self) -> None:
        """Nobody waits: what was had before counts no more."""
        self._had.clear()
        self._floor = 0.0
