"""Who reads which blocks, and until when.

A lease ends `ttl_s` after its last renewal *arrived*; the reader counts from when it was *sent*, so it stops trusting
what it READs before a block may leave. Ids are the worker's own, new for each lease of an incarnation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kelp.core.clock import Clock
from kelp.core.errors import ProtocolError
from kelp.core.types import WorkerKey


@dataclass(eq=False)
class Lease:
    """Slots that one onboarding holds.

    Attributes:
        slots: Each with a reference of this lease.
        on_end: Called once when it ends, however.
    """

    key: WorkerKey
    lease_id: int
    expires_at_s: float
    slots: list[int] = field(default_factory=list)
    is_live: bool = True
    on_end: Callable[[], None] = lambda: None


class LeaseTable:
    """All leases; belongs to one event loop.

    Args:
        release: Gives one reference on a slot back.
    """

    def __init__(self, clock: Clock, ttl_s: float, release: Callable[[int], None]) -> None:
        self.ttl_s = ttl_s
        self._clock = clock
        self._release = release
        self._leases: dict[tuple[WorkerKey, int], Lease] = {}

    def __len__(self) -> int:
        """Live leases."""
        return len(self._leases)

    @property
    def num_slots(self) -> int:
        """Of all of them; a slot counts for each."""
        return sum(len(lease.slots) for lease in self._leases.values())

    def open(self, key: WorkerKey, lease_id: int) -> Lease:
        """A new lease without slots.

        Raises:
            ProtocolError: The id is in use.
        """
        if (key, lease_id) in self._leases:
            raise ProtocolError(f"lease_id: {lease_id} of worker {key[0]} is in use")
        lease = Lease(key, lease_id, self._clock.monotonic_s() + self.ttl_s)
        self._leases[key, lease_id] = lease
        return lease

    def get(self, key: WorkerKey, lease_id: int) -> Lease | None:
        """A live lease."""
        lease = self._leases.get((key, lease_id))
        return None if lease is None or self._has_expired(lease) else lease

    def renew(self, key: WorkerKey, lease_ids: Iterable[int]) -> list[int]:
        """Count the ttl from now; returns those that are alive."""
        alive = [lease for lease_id in lease_ids if (lease := self.get(key, lease_id)) is not None]
        for lease in alive:
            lease.expires_at_s = self._clock.monotonic_s() + self.ttl_s
        return [lease.lease_id for lease in alive]

    def end(self, lease: Lease) -> None:
        """Give its slots back; idempotent."""
        if not lease.is_live:
            return
        lease.is_live = False
        del self._leases[lease.key, lease.lease_id]
        slots, lease.slots = lease.slots, []
        for slot in slots:
            self._release(slot)
        lease.on_end()

    def expire(self) -> int:
        """End what has run out; returns how many."""
        over = [lease for lease in self._leases.values() if self._clock.monotonic_s() >= lease.expires_at_s]
        for lease in over:
            self.end(lease)
        return len(over)

    def end_of(self, key: WorkerKey) -> None:
        """End all leases of a worker's incarnation."""
        for lease in [lease for lease in self._leases.values() if lease.key == key]:
            self.end(lease)

    def _has_expired(self, lease: Lease) -> bool:
        if self._clock.monotonic_s() < lease.expires_at_s:
            return False
        self.end(lease)
        return True
