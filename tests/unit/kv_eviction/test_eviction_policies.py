from __future__ import annotations

import pytest

from kelp.core.config_kv import EvictionName
from kelp.core.types import SequenceHash
from kelp.kv.eviction.base import BlockFacts, EvictionPolicy
from kelp.kv.eviction.catalogue import POLICY_NAMES, make_policy

NUM_SLOTS = 100


def name(sequence: int, position: int = 0) -> SequenceHash:
    return SequenceHash(sequence.to_bytes(8, "little") + position.to_bytes(8, "little"))


def facts(sequence: int, position: int) -> BlockFacts:
    return BlockFacts(name(sequence, position - 1) if position else None, position, 1.0 + 0.1 * position)


def insert(policy: EvictionPolicy, sequence: int, num_blocks: int = 1) -> None:
    for position in range(num_blocks):
        policy.insert(name(sequence, position), facts(sequence, position))


def use(policy: EvictionPolicy, sequence: int, num_blocks: int = 1) -> None:
    for position in range(num_blocks):
        policy.hit(name(sequence, position))


def nobody_holds(_block: SequenceHash) -> bool:
    return False


def evict(policy: EvictionPolicy) -> SequenceHash:
    victim = policy.victim(nobody_holds)
    assert victim is not None
    policy.remove(victim)
    return victim


class HeldBlocks:
    def __init__(self, *blocks: SequenceHash) -> None:
        self.blocks = set(blocks)
        self.num_looks = 0

    def __call__(self, block: SequenceHash) -> bool:
        self.num_looks += 1
        return block in self.blocks


@pytest.fixture(params=POLICY_NAMES)
def policy_name(request: pytest.FixtureRequest) -> EvictionName:
    chosen: EvictionName = request.param
    return chosen


@pytest.fixture
def policy(policy_name: EvictionName) -> EvictionPolicy:
    return make_policy(policy_name, NUM_SLOTS)


def test_a_tier_without_blocks_has_no_victim(policy: EvictionPolicy) -> None:
    assert policy.victim(nobody_holds) is None
    assert len(policy) == 0


def test_of_blocks_stored_together_the_last_one_leaves_first(policy: EvictionPolicy, policy_name: EvictionName) -> None:
    insert(policy, 1, 4)
    expected = [0, 1, 2, 3] if policy_name == "s3-fifo" else [3, 2, 1, 0]
    assert [evict(policy) for _ in range(4)] == [name(1, position) for position in expected]


def test_naming_a_victim_does_not_remove_it(policy: EvictionPolicy) -> None:
    insert(policy, 1, 2)
    assert policy.victim(nobody_holds) == policy.victim(nobody_holds)
    assert len(policy) == 2


def test_held_blocks_stay_and_leave_once_they_are_let_go(policy: EvictionPolicy) -> None:
    insert(policy, 1)
    insert(policy, 2)
    held = HeldBlocks(name(1))
    assert policy.victim(held) == name(2)
    policy.remove(name(2))
    assert policy.victim(held) is None
    held.blocks.clear()
    assert policy.victim(held) == name(1)


def test_a_block_that_was_held_when_its_turn_came_keeps_its_turn(policy: EvictionPolicy) -> None:
    for sequence in range(4):
        insert(policy, sequence)
    assert policy.victim(HeldBlocks(name(0), name(1))) == name(2)
    assert [evict(policy) for _ in range(4)] == [name(sequence) for sequence in range(4)]


def test_many_held_blocks_are_not_looked_at_again_for_every_victim(policy: EvictionPolicy) -> None:
    num_blocks = 2000
    for sequence in range(num_blocks):
        insert(policy, sequence)
    held = HeldBlocks(*(name(sequence) for sequence in range(num_blocks // 2)))
    for sequence in range(num_blocks // 2, num_blocks):
        victim = policy.victim(held)
        assert victim == name(sequence)
        policy.remove(victim)
    assert held.num_looks < 20 * num_blocks


def test_a_block_comes_back_after_it_has_left(policy: EvictionPolicy) -> None:
    insert(policy, 1)
    policy.remove(name(1))
    insert(policy, 1)
    assert len(policy) == 1
    assert evict(policy) == name(1)


def test_what_a_request_used_last_outlives_what_others_used_before() -> None:
    policy = make_policy("lru", NUM_SLOTS)
    insert(policy, 1, 2)
    insert(policy, 2, 2)
    use(policy, 1, 2)
    assert [evict(policy) for _ in range(4)] == [name(2, 1), name(2, 0), name(1, 1), name(1, 0)]


def test_a_favourite_outlives_newer_blocks_until_it_has_aged() -> None:
    policy = make_policy("lfu", NUM_SLOTS)
    insert(policy, 0)
    for _ in range(3):
        use(policy, 0)
    leaving = []
    for sequence in range(1, 10):
        insert(policy, sequence)
        leaving.append(evict(policy))
    assert leaving[:3] == [name(1), name(2), name(3)]
    assert name(0) in leaving


def test_a_scan_passes_through_the_small_queue_and_leaves_what_is_used_alone() -> None:
    policy = make_policy("s3-fifo", NUM_SLOTS)
    for sequence in range(10):
        insert(policy, sequence)
        use(policy, sequence)
        use(policy, sequence)
    for sequence in range(100, 100 + NUM_SLOTS - 10):
        insert(policy, sequence)
    scanned = []
    for sequence in range(1000, 1100):
        scanned.append(evict(policy))
        insert(policy, sequence)
    assert not {name(sequence) for sequence in range(10)} & set(scanned)


def test_a_block_that_left_too_early_is_taken_into_the_main_queue() -> None:
    policy = make_policy("s3-fifo", NUM_SLOTS)
    insert(policy, 1)
    policy.remove(name(1))
    insert(policy, 1)
    for sequence in range(2, 30):
        insert(policy, sequence)
    leaving = [evict(policy) for _ in range(18)]
    assert name(1) not in leaving
