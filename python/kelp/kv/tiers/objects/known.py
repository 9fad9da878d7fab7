"""Which groups the store has, as far as this host knows; bounded memory.

A group is known by the hash of its last block, and, where its blocks are known too, by each of them. What the store was
found not to have is remembered for a while, so that a prompt that nobody has stored costs one question. Knows no
store. Not thread-safe.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kelp.core.clock import Clock
from kelp.core.types import SequenceHash

MAX_GROUPS = 131072
_MAX_ABSENT = 65536
_ABSENT_TTL_S = 30.0


@dataclass(frozen=True, slots=True)
class _Group:
    tenant: bytes
    members: tuple[SequenceHash, ...]


class KnownGroups:
    """See the module docstring; beyond `max_groups` the least recently used is forgotten."""

    def __init__(self, clock: Clock, max_groups: int = MAX_GROUPS, absent_ttl_s: float = _ABSENT_TTL_S) -> None:
        self._clock = clock
        self._max_groups = max_groups
        self._absent_ttl_s = absent_ttl_s
        self._groups: OrderedDict[SequenceHash, _Group] = OrderedDict()
        self._ends: dict[SequenceHash, SequenceHash] = {}
        self._absent: OrderedDict[SequenceHash, float] = OrderedDict()
        self._fresh: set[SequenceHash] = set()

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, last: object) -> bool:
        return last in self._groups

    def __iter__(self) -> Iterator[tuple[SequenceHash, ...]]:
        """Groups: their blocks where those are known, else the last one alone."""
        return iter([group.members or (last,) for last, group in self._groups.items()])

    def add(self, tenant: bytes, last: SequenceHash, members: Sequence[SequenceHash] = ()) -> None:
        """The store has this group; `members` are its blocks in order, the last one included, if known."""
        if last not in self._groups:
            self._groups[last] = _Group(tenant, ())
        self._fresh.add(last)
        self._absent.pop(last, None)
        self.use(last, members)
        if len(self._groups) > self._max_groups:
            self.discard(next(iter(self._groups)))

    def use(self, last: SequenceHash, members: Sequence[SequenceHash] = ()) -> None:
        """A known group is wanted, and these are its blocks if not empty."""
        group = self._groups[last]
        if members and not group.members:
            self._groups[last] = _Group(group.tenant, tuple(members))
            self._ends.update((member, last) for member in members)
        self._groups.move_to_end(last)

    def discard(self, last: SequenceHash) -> None:
        """The store does not have this group, or it is of no use."""
        group = self._groups.pop(last, None)
        self._fresh.discard(last)
        for member in group.members if group else ():
            self._ends.pop(member, None)

    def end_of(self, member: SequenceHash) -> SequenceHash | None:
        """The last block of the known group that `member` is in."""
        return member if member in self._groups else self._ends.get(member)

    def note_absent(self, last: SequenceHash) -> None:
        """The store was asked and does not have this group."""
        self.discard(last)
        self._absent[last] = self._clock.monotonic_s() + self._absent_ttl_s
        self._absent.move_to_end(last)
        if len(self._absent) > _MAX_ABSENT:
            self._absent.popitem(last=False)

    def is_absent(self, last: SequenceHash) -> bool:
        """Whether the store did not have this group a short while ago."""
        until_s = self._absent.get(last)
        return until_s is not None and self._clock.monotonic_s() < until_s

    def forget(self, tenant: bytes | None) -> None:
        """Nothing of a tenant (None: of anybody) is known any more."""
        for last in [last for last, group in self._groups.items() if tenant in (None, group.tenant)]:
            self.discard(last)

    def start_listing(self) -> None:
        """From now on, remember what is added while the store is being listed."""
        self._fresh.clear()

    def keep(self, listed: Iterable[SequenceHash]) -> None:
        """End of a listing: only what it gave, or was added meanwhile, is still there."""
        kept = self._fresh.union(listed)
        for last in [last for last in self._groups if last not in kept]:
            self.discard(last)
