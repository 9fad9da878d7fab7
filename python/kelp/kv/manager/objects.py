"""What routers have been told that the object store holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kelp.core.metrics import KV_TIER_REMOVED
from kelp.core.types import SequenceHash
from kelp.kv.manager.events import TierEvents
from kelp.kv.manager.stats import ManagerStats
from kelp.kv.tiers.base import BlockRecord


class ObjectNames:
    """Blocks of the object store with their tenants, as far as this host has written them."""

    def __init__(self, events: TierEvents, stats: ManagerStats) -> None:
        self._events = events
        self._stats = stats
        self._tenants: dict[SequenceHash, bytes] = {}

    def __len__(self) -> int:
        """Blocks that routers count on."""
        return len(self._tenants)

    def __contains__(self, name: SequenceHash) -> bool:
        """Whether routers count on a block."""
        return name in self._tenants

    def put(self, records: Sequence[BlockRecord]) -> None:
        """The store has these consecutive blocks."""
        fresh = [record for record in records if record.sequence_hash not in self._tenants]
        self._tenants.update((record.sequence_hash, record.tenant) for record in fresh)
        self._events.arrived(fresh)

    def forget(self, tenant: bytes | None) -> None:
        """The store has nothing of a tenant any more (None: nothing at all)."""
        gone = [name for name, owner in self._tenants.items() if tenant in (None, owner)]
        self._remove(gone, "cleared")

    def keep(self, groups: Iterable[tuple[SequenceHash, ...]]) -> None:
        """Of what was written here, the store has these groups still."""
        known = {name for group in groups for name in group}
        self._remove([name for name in self._tenants if name not in known], "evicted")

    def _remove(self, names: Sequence[SequenceHash], reason: str) -> None:
        for name in names:
            del self._tenants[name]
        self._events.left(names)
        self._stats.add(KV_TIER_REMOVED, len(names), tier="object", reason=reason)
