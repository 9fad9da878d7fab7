"""Every policy against a model that only knows which blocks are there."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kelp.core.config_kv import EvictionName
from kelp.core.types import SequenceHash
from kelp.kv.eviction.base import BlockFacts
from kelp.kv.eviction.catalogue import POLICY_NAMES, make_policy
from support.examples import examples

NUM_SLOTS = 8
NUM_SEQUENCES = 6
LENGTH = 4


def name(sequence: int, position: int) -> SequenceHash:
    return SequenceHash(bytes([sequence]) * 8 + bytes([position]) * 8)


class EvictionMachine(RuleBasedStateMachine):
    policy_name: EvictionName = "lru"

    def __init__(self) -> None:
        super().__init__()
        # Twins with one history: nothing but it may decide.
        self.policies = [make_policy(self.policy_name, NUM_SLOTS) for _ in range(2)]
        self.resident: set[SequenceHash] = set()
        self.held: set[SequenceHash] = set()

    def remove(self, block: SequenceHash) -> None:
        for policy in self.policies:
            policy.remove(block)
        self.resident.discard(block)
        self.held.discard(block)

    def make_room(self) -> bool:
        candidates = self.resident - self.held
        victims = [policy.victim(self.held.__contains__) for policy in self.policies]
        assert victims[0] == victims[1], "equal histories gave different victims"
        if victims[0] is None:
            assert not candidates, "an unheld block was not found"
            return False
        assert victims[0] in candidates, "a held or absent block was to leave"
        self.remove(victims[0])
        return True

    @rule(sequence=st.integers(0, NUM_SEQUENCES - 1), num_blocks=st.integers(1, LENGTH), rounds=st.integers(1, 12))
    def serve(self, sequence: int, num_blocks: int, rounds: int) -> None:
        """Rounds make epochs of the cost policy end, so that it learns."""
        for number in range(rounds):
            for position in range(num_blocks):
                self.use((sequence + number) % NUM_SEQUENCES, position)

    def use(self, sequence: int, position: int) -> None:
        block = name(sequence, position)
        if block in self.resident:
            for policy in self.policies:
                policy.hit(block)
        elif len(self.resident) < NUM_SLOTS or self.make_room():
            parent = name(sequence, position - 1) if position else None
            for policy in self.policies:
                policy.insert(block, BlockFacts(parent, position, 1.0 + position))
            self.resident.add(block)

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        self.held |= data.draw(st.sets(st.sampled_from(sorted(self.resident)), max_size=NUM_SLOTS))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        self.held -= data.draw(st.sets(st.sampled_from(sorted(self.held)), min_size=1))

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        """Blocks also leave on other advice than the policy's."""
        self.remove(data.draw(st.sampled_from(sorted(self.resident))))

    @rule()
    def evict(self) -> None:
        self.make_room()

    @invariant()
    def knows_how_many_there_are(self) -> None:
        assert all(len(policy) == len(self.resident) for policy in self.policies)

    def teardown(self) -> None:
        self.held.clear()
        while self.resident:
            assert self.make_room()


@pytest.mark.parametrize("policy_name", POLICY_NAMES)
def test_victims_are_there_unheld_found_and_the_same_for_equal_histories(policy_name: EvictionName) -> None:
    machine = type(f"Machine_{policy_name}", (EvictionMachine,), {"policy_name": policy_name})
    case = machine.TestCase
    case.settings = settings(max_examples=examples(25), stateful_step_count=40, deadline=None)
    case("runTest").runTest()
