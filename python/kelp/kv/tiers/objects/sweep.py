"""One pass over all objects: what there is, whose it is, and which are the oldest. Bounded memory; pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from kelp.core.types import SequenceHash
from kelp.kv.tiers.objects.messages import Listed

_MAX_CANDIDATES = 8192
_MAX_TENANT_CANDIDATES = 2048
_MAX_TRACKED = 131072
"""Candidates of all tenants; beyond, those who have least are left to the next pass."""
_QUOTA_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class Quota:
    """What may lie below the prefix, of all models and hosts.

    Attributes:
        max_bytes: 0 for no bound.
        tenant_share: Of `max_bytes`, most that objects of one tenant may take, but for a single one; 1 bounds nobody.
    """

    max_bytes: int = 0
    tenant_share: float = 1.0

    @property
    def tenant_bytes(self) -> float | None:
        """Most of one tenant; None for no bound."""
        return self.tenant_share * self.max_bytes if self.max_bytes and self.tenant_share < 1 else None


class _Oldest:
    """The oldest of many objects."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._heap: list[tuple[float, str, int]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Key and size, oldest first."""
        return ((key, num_bytes) for _, key, num_bytes in sorted(self._heap, reverse=True))

    def add(self, listed: Listed) -> None:
        candidate = (-listed.modified_s, listed.key, listed.num_bytes)
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, candidate)
        elif candidate > self._heap[0]:
            heapq.heapreplace(self._heap, candidate)


@dataclass(slots=True)
class _Tenant:
    num_objects: int = 0
    num_bytes: int = 0
    oldest: _Oldest = field(default_factory=lambda: _Oldest(_MAX_TENANT_CANDIDATES))


@dataclass
class Sweep:
    """What a listing has given so far.

    Attributes:
        token: Where the listing goes on; empty at its start.
        usable: Of groups that this host can read, the last block and the tenant.
    """

    quota: Quota = field(default_factory=Quota)
    token: str = ""
    num_objects: int = 0
    num_bytes: int = 0
    usable: dict[SequenceHash, bytes] = field(default_factory=dict)
    _oldest: _Oldest = field(default_factory=lambda: _Oldest(_MAX_CANDIDATES))
    _tenants: dict[bytes, _Tenant] = field(default_factory=dict)
    _num_tracked: int = 0

    def add(self, listed: Listed, owner: bytes) -> None:
        """An object of kelp's, of whichever space."""
        self.num_objects += 1
        self.num_bytes += listed.num_bytes
        self._oldest.add(listed)
        if self.quota.tenant_bytes is None:
            return
        tenant = self._tenants.setdefault(owner, _Tenant())
        tenant.num_objects += 1
        tenant.num_bytes += listed.num_bytes
        self._num_tracked -= len(tenant.oldest)
        tenant.oldest.add(listed)
        self._num_tracked += len(tenant.oldest)
        if self._num_tracked > _MAX_TRACKED:
            self._forget_small_ones()

    def full_tenants(self) -> frozenset[bytes]:
        """Whose objects take their share, or nearly, before any surplus is removed."""
        limit = self.quota.tenant_bytes
        if limit is None:
            return frozenset()
        return frozenset(owner for owner, tenant in self._tenants.items() if tenant.num_bytes > _QUOTA_SHARE * limit)

    def surplus(self) -> list[str]:
        """Keys of what is beyond a tenant's share, oldest first, then of the oldest of all that are beyond the quota.

        Their removal leaves a little less than the bound in question. A pass removes a bounded number of objects; the
        next one goes on.
        """
        removed = dict(self._beyond_shares())
        remaining, max_bytes = self.num_bytes - sum(removed.values()), self.quota.max_bytes
        if max_bytes and remaining > max_bytes:
            for key, num_bytes in self._oldest:
                if remaining <= _QUOTA_SHARE * max_bytes:
                    break
                if key not in removed:
                    remaining -= num_bytes
                    removed[key] = num_bytes
        return list(removed)

    def _beyond_shares(self) -> Iterator[tuple[str, int]]:
        limit = self.quota.tenant_bytes
        if limit is None:
            return
        for tenant in self._tenants.values():
            remaining, num_left = tenant.num_bytes, tenant.num_objects
            if remaining <= limit:
                continue
            for key, num_bytes in tenant.oldest:
                if remaining <= _QUOTA_SHARE * limit or num_left == 1:
                    break
                remaining, num_left = remaining - num_bytes, num_left - 1
                yield key, num_bytes

    def _forget_small_ones(self) -> None:
        """Keep those that have most: only they can be far beyond a share."""
        owners = sorted(self._tenants, key=lambda owner: self._tenants[owner].num_bytes)
        for owner in owners:
            if self._num_tracked <= _MAX_TRACKED // 2:
                break
            self._num_tracked -= len(self._tenants.pop(owner).oldest)
