"""The books of one tier: which block lies where, whose it is, who holds it, and which goes first.

Names lead to slots; the slots' lives are in `states`, the order of leaving in an eviction policy. A tenant that has
taken its share makes room among its own blocks. Books only: bytes are moved by whoever asks for slots, and what is
reported through `ShelfWatch` is for events, metrics and wiping.

Slots may still lie under an old record of the medium when they are handed out: `take_stale` says which, and the medium
has to forget them before anything is written there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from kelp.core.errors import InternalError
from kelp.core.types import SequenceHash
from kelp.kv.eviction.base import BlockFacts, EvictionPolicy, HeldCheck
from kelp.kv.manager.shelf_watch import ShelfLimits, ShelfWatch
from kelp.kv.manager.states import SlotState, SlotTable
from kelp.kv.tiers.base import BlockRecord

_UNKNOWN_OWNER = b""


class Shelf:
    """One tier's books; belongs to one event loop."""

    def __init__(
        self,
        num_slots: int,
        policy: EvictionPolicy,
        limits: ShelfLimits,
        watch: ShelfWatch,
        recompute_s: Callable[[int], float],
    ) -> None:
        self.slots = SlotTable(num_slots)
        self._policy = policy
        self._watch = watch
        self._recompute_s = recompute_s
        self._max_tenant_slots = max(1, int(limits.tenant_share * num_slots))
        self._max_pins = int(limits.max_pinned_share * num_slots)
        self._by_name: dict[SequenceHash, int] = {}
        self._records: list[BlockRecord | None] = [None] * num_slots
        # Whose bytes lie in a slot, also after it has become free; None: nobody's.
        self._owners: list[bytes | None] = [None] * num_slots
        self._used: Counter[bytes] = Counter()
        self._unwanted: set[int] = set()
        self._stale: set[int] = set()
        self._pins: dict[SequenceHash, float] = {}

    def __len__(self) -> int:
        """Blocks that can be found."""
        return len(self._by_name)

    def __contains__(self, name: SequenceHash) -> bool:
        """Whether a block can be found."""
        return name in self._by_name

    @property
    def num_pins(self) -> int:
        """Pinned blocks."""
        return len(self._pins)

    @property
    def num_free(self) -> int:
        """Slots that can be taken without anything leaving."""
        return self.slots.count(SlotState.FREE)

    def used_by(self, tenant: bytes) -> int:
        """Slots that a tenant's blocks take, those on their way included."""
        return self._used[tenant]

    def names(self) -> Iterable[SequenceHash]:
        """All blocks that can be found."""
        return self._by_name.keys()

    def slot(self, name: SequenceHash) -> int | None:
        """Where a block lies."""
        return self._by_name.get(name)

    def resident(self, begin: int, end: int) -> list[BlockRecord]:
        """Blocks that can be found in the slots from `begin` on, `end` excluded."""
        slots = range(begin, min(end, len(self.slots)))
        return [self.record(slot) for slot in slots if self.slots.state(slot) is SlotState.RESIDENT]

    def record(self, slot: int) -> BlockRecord:
        """What lies in a slot that is RESIDENT or DOOMED."""
        record = self._records[slot]
        assert record is not None
        return record

    def reserve(self, tenant: bytes, count: int) -> list[int]:
        """Take slots to be filled, making room where it must be made; fewer if all others are held."""
        taken: list[int] = []
        while len(taken) < count and (slot := self._take(tenant)) is not None:
            self._owners[slot] = tenant
            self._used[tenant] += 1
            taken.append(slot)
        return taken

    def take_stale(self, slots: Sequence[int]) -> list[int]:
        """Those of the slots under which the medium still has a record; from now on they count as forgotten."""
        stale = [slot for slot in slots if slot in self._stale]
        self._stale.difference_update(stale)
        return stale

    def store(self, slot: int) -> bool:
        """The bytes are there and wait for their owner's word; False, and the slot is gone, if nobody wants them."""
        if self._drop_unwanted(slot):
            return False
        self.slots.move(slot, SlotState.STORED)
        return True

    def settle(self, slot: int, record: BlockRecord) -> bool:
        """The slot holds this block; False, and the slot is gone, if it has been cleared or lies elsewhere already."""
        if self._drop_unwanted(slot):
            return False
        if record.sequence_hash in self._by_name:
            self.drop(slot)
            return False
        self._arrive(slot, record)
        return True

    def drop(self, slot: int) -> None:
        """What was to come into the slot does not come."""
        if self._drop_unwanted(slot):
            return
        self._unuse(slot)
        self.slots.move(slot, SlotState.FREE)

    def adopt(self, slot: int, record: BlockRecord) -> bool:
        """An earlier process left this block here; False if it lies elsewhere already, or is beyond a share."""
        if not 0 <= slot < len(self.slots) or self.slots.state(slot) is not SlotState.FREE:
            return False
        if record.sequence_hash in self._by_name or self._used[record.tenant] >= self._max_tenant_slots:
            return False
        self._owners[slot] = record.tenant
        self._used[record.tenant] += 1
        self._arrive(slot, record)
        return True

    def suspect_free(self) -> None:
        """Free slots may hold anybody's bytes: what an earlier process left without a record."""
        for slot in self.slots.in_state(SlotState.FREE):
            self._owners[slot] = _UNKNOWN_OWNER

    def hit(self, name: SequenceHash) -> None:
        """The block was used; blocks of one request in order of position."""
        self._policy.hit(name)

    def hold(self, slot: int) -> None:
        """Keep a block where it is."""
        self.slots.hold(slot)

    def release(self, slot: int) -> None:
        """Give a reference back; what nobody finds any more goes with the last one."""
        if self.slots.release(slot) and self.slots.state(slot) is SlotState.DOOMED:
            self._vacate(slot)

    def remove(self, name: SequenceHash, reason: str) -> bool:
        """The block is no longer found; its slot is free once nobody holds it. False if it was not there."""
        slot = self._by_name.get(name)
        if slot is None:
            return False
        self._leave(slot, reason)
        return True

    def clear(self, tenant: bytes | None) -> int:
        """Remove a tenant's blocks (None: all), also those on their way, and wipe all bytes of them."""
        num_removed = 0
        for slot in range(len(self.slots)):
            state, owner = self.slots.state(slot), self._owners[slot]
            if owner is None or (tenant is not None and owner not in (tenant, _UNKNOWN_OWNER)):
                continue
            if state is SlotState.RESIDENT:
                self._unwanted.add(slot)
                self._leave(slot, "cleared")
                num_removed += 1
            elif state is SlotState.FREE:
                self.slots.move(slot, SlotState.WIPING)
                self._watch.wipe(slot)
            elif state in (SlotState.FILLING, SlotState.DOOMED):
                self._unwanted.add(slot)
            elif state is SlotState.STORED:
                self._unwanted.add(slot)
                self._drop_unwanted(slot)
        return num_removed

    def wiped(self, slot: int) -> None:
        """Nothing of the former content is left."""
        self._owners[slot] = None
        self._stale.discard(slot)
        self.slots.move(slot, SlotState.FREE)

    def pin(self, name: SequenceHash, until_s: float) -> bool:
        """Keep a block until then; False if it is not there or too much is pinned."""
        if name not in self._by_name or (name not in self._pins and len(self._pins) >= self._max_pins):
            return False
        self._pins[name] = until_s
        return True

    def unpin(self, name: SequenceHash) -> None:
        """The block may leave like any other; idempotent."""
        self._pins.pop(name, None)

    def expire_pins(self, now_s: float) -> None:
        """Let go of what was pinned until before now."""
        for name in [name for name, until_s in self._pins.items() if until_s <= now_s]:
            del self._pins[name]

    def is_held(self, block: SequenceHash) -> bool:
        """Whether the block must stay."""
        return block in self._pins or self.slots.references(self._by_name[block]) > 0

    def check_integrity(self) -> None:
        """Verify every invariant; for tests.

        Raises:
            InternalError: The books contradict themselves.
        """
        self.slots.check_integrity()
        resident = set(self.slots.in_state(SlotState.RESIDENT))
        _require(set(self._by_name.values()) == resident, "names and resident slots differ")
        _require(all(self.record(slot).sequence_hash == name for name, slot in self._by_name.items()), "a wrong name")
        _require(len(self._policy) == len(self._by_name), "the eviction policy has other blocks")
        unused = (SlotState.FREE, SlotState.WIPING)
        used = Counter(
            owner
            for slot, owner in enumerate(self._owners)
            if owner is not None and self.slots.state(slot) not in unused
        )
        _require(used == +self._used, "the tenants' slots are miscounted")
        _require(all(self._used[tenant] <= self._max_tenant_slots for tenant in used), "a tenant is beyond its share")
        _require(set(self._pins) <= set(self._by_name), "a block is pinned that is not there")

    def _take(self, tenant: bytes) -> int | None:
        is_beyond = self._used[tenant] >= self._max_tenant_slots
        if not is_beyond and (slot := self.slots.take()) is not None:
            return slot
        held: HeldCheck = self._is_held_or_foreign(tenant) if is_beyond else self.is_held
        victim = self._policy.victim(held)
        if victim is None:
            return None
        slot = self._by_name[victim]
        self._leave(slot, "evicted")
        # The very slot: else its record stays on the medium, and comes back after a crash in place of a better one.
        return self.slots.retake(slot)

    def _is_held_or_foreign(self, tenant: bytes) -> HeldCheck:
        def is_held(block: SequenceHash) -> bool:
            return self._owners[self._by_name[block]] != tenant or self.is_held(block)

        return is_held

    def _arrive(self, slot: int, record: BlockRecord) -> None:
        self.slots.move(slot, SlotState.RESIDENT)
        self._records[slot] = record
        self._by_name[record.sequence_hash] = slot
        cost_s = self._recompute_s(record.position)
        self._policy.insert(record.sequence_hash, BlockFacts(record.parent, record.position, cost_s))
        self._watch.arrived(record)

    def _leave(self, slot: int, reason: str) -> None:
        record = self.record(slot)
        del self._by_name[record.sequence_hash]
        self._pins.pop(record.sequence_hash, None)
        self._policy.remove(record.sequence_hash)
        self._stale.add(slot)
        self._watch.left(record, reason)
        if self.slots.references(slot):
            self.slots.move(slot, SlotState.DOOMED)
        else:
            self._vacate(slot)

    def _vacate(self, slot: int) -> None:
        self._records[slot] = None
        if not self._drop_unwanted(slot):
            self._unuse(slot)
            self.slots.move(slot, SlotState.FREE)

    def _drop_unwanted(self, slot: int) -> bool:
        if slot not in self._unwanted:
            return False
        self._unwanted.discard(slot)
        self._unuse(slot)
        self.slots.move(slot, SlotState.WIPING)
        self._watch.wipe(slot)
        return True

    def _unuse(self, slot: int) -> None:
        owner = self._owners[slot]
        assert owner is not None
        self._used[owner] -= 1


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise InternalError(f"KV shelf integrity: {what}")
