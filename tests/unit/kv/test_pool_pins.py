"""Pinned blocks are evicted last, or not at all."""

import pytest

from kelp.core.errors import CapacityError, InternalError
from kelp.core.kv_events import BlocksRemoved
from kelp.core.types import BlockId, SequenceHash
from kelp.kv.pool import BlockPool


def name(index: int) -> SequenceHash:
    return SequenceHash(index.to_bytes(16, "little"))


def full_pool(num_blocks: int) -> BlockPool:
    """All blocks cached, and evicted in the order of their ids."""
    pool = BlockPool(num_blocks)
    blocks = pool.allocate(num_blocks)
    for block_id in blocks:
        pool.seal(block_id, name(block_id))
    pool.release(blocks[::-1])
    return pool


def ids(*numbers: int) -> list[BlockId]:
    return list(map(BlockId, numbers))


def test_loosely_pinned_blocks_are_evicted_after_all_others_and_in_order():
    pool = full_pool(6)
    pool.pin(ids(0, 1, 3), is_firm=False)
    assert pool.num_available == 6
    assert pool.allocate(2) == ids(2, 4)
    assert pool.allocate(2) == ids(5, 0)
    assert pool.allocate(2) == ids(1, 3)
    assert pool.num_pinned == 0
    pool.check_integrity()


def test_firmly_pinned_blocks_are_not_evicted_until_pins_are_loosened():
    pool = full_pool(4)
    pool.pin(ids(0, 1))
    pool.pin(ids(2), is_firm=False)
    assert pool.allocate(2) == ids(3, 2)
    assert pool.num_available == 0
    with pytest.raises(CapacityError):
        pool.allocate(1)
    pool.loosen_pins()
    assert pool.num_available == 2
    assert pool.allocate(1) == ids(0)
    pool.unpin(ids(1))
    pool.check_integrity()


def test_a_pin_ends_with_its_block():
    pool, told = full_pool(2), []
    pool.watch(told.append)
    pool.pin(ids(0, 1), is_firm=False)
    (block_id,) = pool.allocate(1)
    assert told == [BlocksRemoved((name(block_id),))]
    assert not pool.is_pinned(block_id)
    with pytest.raises(InternalError, match="which is not pinned"):
        pool.unpin([block_id])
    pool.seal(block_id, name(9))
    pool.pin([block_id])
    pool.release([block_id])
    assert (pool.num_pinned, pool.num_available) == (2, 1)
    pool.check_integrity()


def test_a_pinned_block_that_was_used_meanwhile_is_still_pinned():
    pool = full_pool(3)
    pool.pin(ids(0), is_firm=False)
    pool.release(pool.match([name(0)]))
    assert pool.allocate(2) == ids(1, 2)
    pool.unpin(ids(0))
    assert pool.allocate(1) == ids(0)
