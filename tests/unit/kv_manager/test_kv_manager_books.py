"""Slots, shelves, leases and rates: the manager's books without bytes."""

from __future__ import annotations

import pytest
from manager_rig import BLOCK_BYTES, TENANT, prompt_hashes

from kelp.core.clock import FakeClock
from kelp.core.errors import InternalError, ProtocolError
from kelp.core.types import SequenceHash, Tier
from kelp.kv.eviction.lru import LruPolicy
from kelp.kv.manager.leases import LeaseTable
from kelp.kv.manager.rates import Recompute, TierRates, num_worth_bringing
from kelp.kv.manager.shelf import Shelf
from kelp.kv.manager.shelf_watch import ShelfLimits
from kelp.kv.manager.states import SlotState, SlotTable
from kelp.kv.tiers.base import BlockRecord

NAMES = prompt_hashes(8)
OTHER = b"o" * 16


class Watch:
    """Keeps what a shelf says."""

    def __init__(self) -> None:
        self.here: list[SequenceHash] = []
        self.gone: list[tuple[SequenceHash, str]] = []
        self.to_wipe: list[int] = []

    def arrived(self, record: BlockRecord) -> None:
        self.here.append(record.sequence_hash)

    def left(self, record: BlockRecord, reason: str) -> None:
        self.gone.append((record.sequence_hash, reason))

    def wipe(self, slot: int) -> None:
        self.to_wipe.append(slot)


def record(index: int, tenant: bytes = TENANT) -> BlockRecord:
    parent = NAMES[index - 1] if index else None
    return BlockRecord(NAMES[index], parent, index, tenant, b"checksum")


def make_shelf(num_slots: int = 4, tenant_share: float = 1.0) -> tuple[Shelf, Watch]:
    watch = Watch()
    return Shelf(num_slots, LruPolicy(), ShelfLimits(tenant_share), watch, lambda position: 1.0), watch


def put(shelf: Shelf, index: int, tenant: bytes = TENANT) -> int:
    (slot,) = shelf.reserve(tenant, 1)
    assert shelf.settle(slot, record(index, tenant))
    return slot


def test_a_move_that_the_table_forbids_is_a_bug_and_says_so():
    table = SlotTable(2)
    with pytest.raises(InternalError, match="KV slot 0: free cannot become stored"):
        table.move(0, SlotState.STORED)
    slot = table.take()
    assert slot is not None
    with pytest.raises(InternalError, match="filling, cannot be held"):
        table.hold(slot)
    with pytest.raises(InternalError, match="without a reference"):
        table.release(slot)


def test_a_held_slot_cannot_become_free():
    table = SlotTable(1)
    table.move(0, SlotState.RESIDENT)
    table.hold(0)
    with pytest.raises(InternalError, match="1 references"):
        table.move(0, SlotState.FREE)
    assert table.release(0)
    table.move(0, SlotState.FREE)
    assert table.take() == 0
    assert table.take() is None


def test_a_full_shelf_makes_room_but_not_among_held_blocks():
    shelf, watch = make_shelf(2)
    slot = put(shelf, 0)
    put(shelf, 1)
    shelf.hold(slot)
    assert len(shelf.reserve(TENANT, 2)) == 1
    assert watch.gone == [(NAMES[1], "evicted")]
    assert shelf.slot(NAMES[0]) == slot
    shelf.check_integrity()


def test_a_slot_that_is_filled_again_is_stale_until_the_medium_forgot_it():
    shelf, _ = make_shelf(1)
    slot = put(shelf, 0)
    assert shelf.reserve(TENANT, 1) == [slot]
    assert shelf.take_stale([slot]) == [slot]
    assert shelf.take_stale([slot]) == []


def test_a_tenant_beyond_its_share_makes_room_among_its_own_blocks():
    shelf, watch = make_shelf(4, tenant_share=0.5)
    put(shelf, 0)
    put(shelf, 1, OTHER)
    put(shelf, 2, OTHER)
    put(shelf, 3, OTHER)
    ((gone, reason),) = watch.gone
    assert reason == "evicted", "there was a free slot, but the tenant had its share"
    assert gone in NAMES[1:3], "its own"
    assert shelf.used_by(OTHER) == 2
    shelf.check_integrity()


def test_a_tenant_whose_share_is_held_gets_nothing():
    shelf, _ = make_shelf(4, tenant_share=0.25)
    shelf.hold(put(shelf, 0))
    assert shelf.reserve(TENANT, 1) == []


def test_clearing_a_tenant_removes_what_is_there_what_is_coming_and_what_has_been():
    shelf, watch = make_shelf(4)
    resident, foreign = put(shelf, 0), put(shelf, 1, OTHER)
    (filling,) = shelf.reserve(TENANT, 1)
    (dropped,) = shelf.reserve(TENANT, 1)
    shelf.drop(dropped)
    assert shelf.clear(TENANT) == 1
    assert sorted(watch.to_wipe) == sorted([resident, dropped])
    assert not shelf.settle(filling, record(2)), "it has been cleared before it came"
    assert filling in watch.to_wipe
    assert shelf.slot(NAMES[1]) == foreign
    for slot in watch.to_wipe:
        shelf.wiped(slot)
    assert shelf.slots.count(SlotState.FREE) == 3
    shelf.check_integrity()


def test_a_cleared_block_that_is_being_read_goes_with_its_last_reader():
    shelf, watch = make_shelf(2)
    slot = put(shelf, 0)
    shelf.hold(slot)
    shelf.clear(None)
    assert (NAMES[0] in shelf, watch.to_wipe) == (False, [])
    shelf.release(slot)
    assert watch.to_wipe == [slot]


def test_a_block_that_lies_somewhere_already_is_not_taken_twice():
    shelf, _ = make_shelf(2)
    put(shelf, 0)
    (slot,) = shelf.reserve(TENANT, 1)
    assert not shelf.settle(slot, record(0))
    assert shelf.slots.count(SlotState.FREE) == 1


def test_pinned_blocks_stay_until_their_time_is_over_and_take_a_share_at_most():
    shelf, _ = make_shelf(2)
    put(shelf, 0)
    put(shelf, 1)
    assert shelf.pin(NAMES[0], until_s=10.0)
    assert not shelf.pin(NAMES[1], until_s=10.0), "half of the tier is pinned"
    assert len(shelf.reserve(TENANT, 2)) == 1
    shelf.expire_pins(9.9)
    assert shelf.is_held(NAMES[0])
    shelf.expire_pins(10.0)
    assert not shelf.is_held(NAMES[0])


def test_a_lease_ends_a_ttl_after_its_last_renewal():
    clock, released = FakeClock(), []
    table = LeaseTable(clock, 10.0, released.append)
    lease = table.open(("w", "e"), 1)
    lease.slots.append(3)
    clock.advance(9)
    assert table.renew(("w", "e"), [1, 2]) == [1]
    clock.advance(9)
    assert table.expire() == 0
    clock.advance(1)
    assert table.expire() == 1
    assert released == [3]
    assert table.renew(("w", "e"), [1]) == []


def test_a_lease_belongs_to_one_incarnation_and_its_id_is_used_once():
    table = LeaseTable(FakeClock(), 10.0, lambda slot: None)
    table.open(("w", "e1"), 1)
    table.open(("w", "e2"), 1)
    with pytest.raises(ProtocolError, match="lease_id: 1 of worker w"):
        table.open(("w", "e1"), 1)
    table.end_of(("w", "e1"))
    assert table.get(("w", "e1"), 1) is None
    assert table.get(("w", "e2"), 1) is not None


def test_rates_follow_what_is_measured():
    rates = TierRates(BLOCK_BYTES, FakeClock())
    for _ in range(50):
        rates.observe(Tier.DISK, 10, 2.0)
    assert rates.seconds(Tier.DISK, 10) == pytest.approx(2.0, rel=0.01)
    assert rates.seconds(Tier.DISK, 0) == 0.0


def test_what_takes_longer_to_bring_than_to_compute_is_not_brought():
    rates = TierRates(BLOCK_BYTES, FakeClock())
    for _ in range(50):
        rates.observe(Tier.OBJECT, 4, 100.0)
    tiers = [Tier.HOST] * 4 + [Tier.OBJECT] * 4
    assert num_worth_bringing(tiers, Recompute(8, 1.0), rates) == 4
    assert num_worth_bringing(tiers, Recompute(8, 1000.0), rates) == 8
    assert num_worth_bringing(tiers, Recompute(8, 0.0), rates) == 8, "unknown: all"
    assert num_worth_bringing(tiers, Recompute(8, 1e-6), rates) == 0
