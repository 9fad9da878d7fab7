"""The pool against a model that only counts references."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kelp.core.types import BlockId, SequenceHash
from kelp.kv.pool import BlockPool
from support.examples import examples

NUM_BLOCKS = 6


def name(index: int) -> SequenceHash:
    return SequenceHash(index.to_bytes(16, "little"))


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.holders: list[list[BlockId]] = []
        self.sealed: dict[SequenceHash, BlockId] = {}
        self.pinned: dict[BlockId, bool] = {}

    @precondition(lambda self: self.pool.num_available > 0)
    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        held = {block_id for holder in self.holders for block_id in holder}
        order = [self.sealed[key] for key in self.pool.next_evicted(NUM_BLOCKS)]
        victims = [block_id for block_id in order if block_id not in self.pinned]
        victims += [block_id for block_id in order if self.pinned.get(block_id) is False]
        num_free = self.pool.num_free
        blocks = self.pool.allocate(data.draw(st.integers(1, self.pool.num_available)))
        assert not held & set(blocks), "a held block was handed out"
        assert blocks[num_free:] == victims[: max(0, len(blocks) - num_free)], "another one was next"
        assert len(set(blocks)) == len(blocks)
        self.pinned = {key: value for key, value in self.pinned.items() if key not in blocks}
        self.sealed = {key: value for key, value in self.sealed.items() if value not in blocks}
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.holders))
        self.pool.reference(blocks)
        self.holders.append(list(blocks))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.release(self.holders.pop(index))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), index=st.integers(0, 9))
    def seal(self, data: st.DataObject, index: int) -> None:
        block_id = data.draw(st.sampled_from([block for holder in self.holders for block in holder]))
        if block_id not in self.sealed.values():
            is_first = name(index) not in self.sealed
            assert self.pool.seal(block_id, name(index)) == is_first
            self.sealed.setdefault(name(index), block_id)

    @rule(indices=st.lists(st.integers(0, 9), max_size=4, unique=True))
    def match(self, indices: list[int]) -> None:
        expected: list[BlockId] = []
        for index in indices:
            if name(index) not in self.sealed:
                break
            expected.append(self.sealed[name(index)])
        assert self.pool.match([name(index) for index in indices]) == expected
        if expected:
            self.holders.append(expected)

    @rule(data=st.data(), is_firm=st.booleans())
    def pin(self, data: st.DataObject, is_firm: bool) -> None:
        unpinned = sorted(set(self.sealed.values()) - self.pinned.keys())
        chosen = data.draw(st.lists(st.sampled_from(unpinned), unique=True)) if unpinned else []
        self.pool.pin(chosen, is_firm)
        self.pinned.update(dict.fromkeys(chosen, is_firm))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.pinned)), unique=True))
        before = self.pool.next_evicted(NUM_BLOCKS)
        self.pool.unpin(chosen)
        for block_id in chosen:
            del self.pinned[block_id]
        assert self.pool.next_evicted(NUM_BLOCKS) == before, "a pin changes no order"

    @rule()
    def loosen_pins(self) -> None:
        self.pool.loosen_pins()
        self.pinned = dict.fromkeys(self.pinned, False)

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check_integrity()
        references = Counter(block_id for holder in self.holders for block_id in holder)
        for block_id in map(BlockId, range(NUM_BLOCKS)):
            assert self.pool.num_references(block_id) == references[block_id]
        assert self.pool.num_held == len(references)
        unheld = [block_id for block_id in self.sealed.values() if not references[block_id]]
        assert self.pool.num_cached == len(unheld)
        assert self.pool.num_pinned == len(self.pinned)
        assert self.pool.num_available == NUM_BLOCKS - len(references) - sum(
            self.pinned.get(block_id, False) for block_id in unheld
        )
        assert self.pool.count_known([name(index) for index in range(10)]) == next(
            (index for index in range(10) if name(index) not in self.sealed), 10
        )

    def teardown(self) -> None:
        for holder in self.holders:
            self.pool.release(holder)
        self.pool.unpin(self.pinned)
        assert self.pool.num_available == NUM_BLOCKS
        assert self.pool.num_held == 0


PoolMachine.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40, deadline=None)
TestNoBlockIsLostOrFreedTwice = PoolMachine.TestCase
