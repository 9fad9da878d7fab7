"""Leases on the manager's slots, seen from the reader: what was READ counts only while they are known to have lived.

The manager counts a lease's time from when a renewal arrived, the reader from when it was sent, so the reader is always
the more careful of the two (`kv.handoff.lease` does the same between workers).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, field

from kelp.worker.tiers.link import Link
from kelp.worker.tiers.traffic import ReadTraffic

_CLOCK_DRIFT = 0.01
"""The clocks of two machines are assumed to run at rates that differ by less than this."""


@dataclass(eq=False)
class Lease:
    """One onboarding's claim on slots.

    Attributes:
        valid_until_s: Monotonic time until which its slots hold their blocks for certain.
        traffic: What was READ under it.
    """

    lease_id: int
    link: Link
    valid_until_s: float = 0.0
    is_lost: bool = False
    traffic: ReadTraffic = field(default_factory=ReadTraffic)

    def renewed(self, sent_s: float) -> None:
        """What was sent then has been answered: the lease lived when it arrived, and for the ttl from then on."""
        self.valid_until_s = max(self.valid_until_s, sent_s + self.link.ttl_s * (1 - _CLOCK_DRIFT))

    def covers(self, time_s: float) -> bool:
        """Whether what was READ by then can be trusted."""
        return not self.is_lost and time_s <= self.valid_until_s


class LeaseBook:
    """Leases that shall be renewed; ids are never used twice."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._leases: dict[int, Lease] = {}

    def __len__(self) -> int:
        """Leases that nobody has ended."""
        return len(self._leases)

    def open(self, link: Link) -> Lease:
        """A lease to be asked for."""
        lease = Lease(next(self._numbers), link)
        self._leases[lease.lease_id] = lease
        return lease

    def close(self, lease: Lease) -> None:
        """Renew it no longer; idempotent."""
        self._leases.pop(lease.lease_id, None)

    def of(self, link: Link) -> list[Lease]:
        """Those that this incarnation of the manager has answered."""
        return [lease for lease in self._leases.values() if lease.link is link and lease.valid_until_s]

    def renewed(self, asked: Collection[Lease], alive: Collection[int], sent_s: float) -> None:
        """The manager has said which of some leases are alive."""
        for lease in asked:
            if lease.lease_id in alive:
                lease.renewed(sent_s)
            else:
                lease.is_lost = True
