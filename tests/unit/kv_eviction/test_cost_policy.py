from __future__ import annotations

import random

import pytest

from kelp.core.types import SequenceHash
from kelp.kv.eviction.base import BlockFacts, EvictionPolicy
from kelp.kv.eviction.catalogue import make_policy
from kelp.kv.eviction.hazards import ReuseRates

NUM_SLOTS = 256


def name(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "little"))


class Tier:
    def __init__(self, policy: EvictionPolicy, num_slots: int = NUM_SLOTS) -> None:
        self.policy = policy
        self.num_slots = num_slots
        self.resident: set[SequenceHash] = set()
        self.evicted: list[SequenceHash] = []
        self.num_hits = 0

    def ask(self, number: int, cost: float = 1.0, parent: int | None = None) -> None:
        block = name(number)
        if block in self.resident:
            self.num_hits += 1
            self.policy.hit(block)
            return
        while len(self.resident) >= self.num_slots:
            self.make_room()
        self.policy.insert(
            block, BlockFacts(None if parent is None else name(parent), 0 if parent is None else 1, cost)
        )
        self.resident.add(block)

    def make_room(self) -> None:
        victim = self.policy.victim(lambda _: False)
        assert victim is not None
        self.policy.remove(victim)
        self.resident.remove(victim)
        self.evicted.append(victim)


def play_loop_and_scan(tier: Tier, num_rounds: int = 40) -> None:
    """A loop that just does not fit together with what passes between its rounds and never comes back."""
    for scanned in range(num_rounds):
        for number in range(NUM_SLOTS // 2):
            tier.ask(number)
        for number in range(NUM_SLOTS):
            tier.ask(10_000 + scanned * NUM_SLOTS + number)


def test_before_anything_was_missed_victims_are_those_of_lru() -> None:
    cost, lru = Tier(make_policy("cost", NUM_SLOTS)), Tier(make_policy("lru", NUM_SLOTS))
    generator = random.Random(1)
    for number in range(4 * NUM_SLOTS):
        for tier in (cost, lru):
            tier.ask(number, cost=1.0 + number % 7)
        recent = number - generator.randrange(min(number + 1, NUM_SLOTS // 2))
        for tier in (cost, lru):
            tier.ask(recent)
    assert cost.evicted and cost.evicted == lru.evicted


def test_blocks_that_come_back_late_are_kept_from_those_that_never_do() -> None:
    cost, lru = Tier(make_policy("cost", NUM_SLOTS)), Tier(make_policy("lru", NUM_SLOTS))
    for tier in (cost, lru):
        play_loop_and_scan(tier)
    assert lru.num_hits == 0
    assert cost.num_hits > 20 * NUM_SLOTS // 2


def test_of_blocks_wanted_alike_the_dear_ones_are_kept() -> None:
    tier = Tier(make_policy("cost", NUM_SLOTS))
    generator = random.Random(2)
    for _ in range(60 * NUM_SLOTS):
        number = generator.randrange(4 * NUM_SLOTS)
        tier.ask(number, cost=8.0 if number % 2 else 1.0)
    num_dear = sum(int.from_bytes(block, "little") % 2 for block in tier.resident)
    assert num_dear > 0.8 * NUM_SLOTS


def test_a_block_stays_while_one_that_needs_it_does() -> None:
    tier = Tier(make_policy("cost", NUM_SLOTS))
    play_loop_and_scan(tier)
    for pair in range(NUM_SLOTS // 4):
        tier.make_room()
        tier.make_room()
        tier.ask(1_000_000 + 2 * pair, cost=1e-3)
        tier.ask(1_000_001 + 2 * pair, cost=1e3, parent=1_000_000 + 2 * pair)
    while tier.resident:
        tier.make_room()
        for pair in range(NUM_SLOTS // 4):
            head, tail = name(1_000_000 + 2 * pair), name(1_000_001 + 2 * pair)
            assert head in tier.resident or tail not in tier.resident


def test_what_is_remembered_of_former_blocks_is_bounded() -> None:
    policy = make_policy("cost", NUM_SLOTS)
    tier = Tier(policy)
    for number in range(40 * NUM_SLOTS):
        tier.ask(number)
    remembered = policy._tracked  # type: ignore[attr-defined]
    assert len(remembered) <= 5 * NUM_SLOTS
    assert tier.resident <= set(remembered)


def test_a_class_that_is_wanted_more_often_is_worth_more_and_unseen_ages_ever_less() -> None:
    rates = ReuseRates(num_classes=2, max_age=64, prior=1.0)
    for age in range(8):
        for kind, num_wanted in ((0, 2), (1, 20)):
            for _ in range(num_wanted):
                rates.note_wanted(kind, age)
            rates.note_passed(kind, age, 100)
    rates.learn()
    assert rates.worth(1, 3) > 3 * rates.worth(0, 3) > 0
    assert rates.worth(1, 7) > rates.worth(1, 20) > rates.worth(1, 60) > 0


def test_a_block_is_worth_keeping_for_what_comes_later() -> None:
    rates = ReuseRates(num_classes=1, max_age=64, prior=1.0)
    for age in range(16):
        rates.note_passed(0, age, 1000)
    for _ in range(500):
        rates.note_wanted(0, 3)
    rates.learn()
    assert rates.worth(0, 3) == pytest.approx(1 / 3, rel=0.02)
    assert rates.worth(0, 0) > 0.05
    assert rates.worth(0, 4) < 0.01
