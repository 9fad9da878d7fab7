import pytest

from kelp.core.errors import CapacityError, InternalError
from kelp.core.kv_events import BlocksRemoved, BlocksStored
from kelp.core.types import BlockId, SequenceHash
from kelp.kv.pool import BlockPool, BlockState


def name(index: int) -> SequenceHash:
    return SequenceHash(index.to_bytes(16, "little"))


def pool_with_cached_chain(num_blocks: int, chain_length: int) -> tuple[BlockPool, list[BlockId]]:
    pool = BlockPool(num_blocks)
    chain = pool.allocate(chain_length)
    for index, block_id in enumerate(chain):
        pool.seal(block_id, name(index))
    pool.release(chain)
    return pool, chain


def test_allocated_blocks_are_distinct_and_held_until_released():
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    assert len(set(blocks)) == 3
    assert (pool.num_free, pool.num_cached, pool.num_held) == (1, 0, 3)
    pool.release(blocks)
    assert (pool.num_free, pool.num_cached, pool.num_held) == (4, 0, 0)
    pool.check_integrity()


def test_asking_for_more_than_available_takes_nothing():
    pool = BlockPool(2)
    with pytest.raises(CapacityError, match="3 KV blocks asked for, 2 available"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_releasing_a_free_block_is_refused():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(InternalError, match="which is free"):
        pool.release(blocks)


def test_releasing_a_cached_block_is_refused():
    pool, chain = pool_with_cached_chain(2, 1)
    with pytest.raises(InternalError, match="which is cached"):
        pool.release(chain)


def test_a_block_outside_the_pool_is_refused():
    with pytest.raises(InternalError, match="outside the pool of 2"):
        BlockPool(2).release([BlockId(2)])
    with pytest.raises(InternalError, match="outside the pool of 2"):
        BlockPool(2).state(BlockId(-1))


def test_a_block_with_two_references_survives_one_release():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.reference(blocks)
    pool.release(blocks)
    assert pool.state(blocks[0]) is BlockState.HELD
    pool.release(blocks)
    assert pool.state(blocks[0]) is BlockState.FREE


def test_a_reference_on_a_block_nobody_holds_is_refused():
    with pytest.raises(InternalError, match="reference of block 0"):
        BlockPool(1).reference([BlockId(0)])


def test_a_sealed_block_stays_matchable_after_release():
    pool, chain = pool_with_cached_chain(4, 2)
    assert (pool.num_free, pool.num_cached) == (2, 2)
    assert pool.match([name(0), name(1), name(9)]) == chain
    assert pool.num_held == 2


def test_matching_stops_at_the_first_unknown_block():
    pool, chain = pool_with_cached_chain(4, 2)
    assert pool.match([name(0), name(9), name(1)]) == chain[:1]
    assert pool.match([name(9), name(0)]) == []


def test_matching_a_held_block_shares_it():
    pool = BlockPool(2)
    (block_id,) = pool.allocate(1)
    pool.seal(block_id, name(0))
    assert pool.match([name(0)]) == [block_id]
    assert pool.num_references(block_id) == 2


def test_free_blocks_are_taken_before_cached_ones_are_evicted():
    pool, chain = pool_with_cached_chain(3, 2)
    (taken,) = pool.allocate(1)
    assert taken not in chain
    assert pool.num_cached == 2


def test_the_tail_of_a_released_sequence_is_evicted_first():
    pool, chain = pool_with_cached_chain(3, 3)
    assert pool.allocate(1) == [chain[2]]
    assert pool.match([name(0), name(1), name(2)]) == chain[:2]


def test_the_least_recently_released_sequence_is_evicted_first():
    pool, chain = pool_with_cached_chain(2, 2)
    pool.release(pool.match([name(0)]))
    assert pool.allocate(1) == [chain[1]]


def test_an_evicted_block_can_no_longer_be_matched():
    pool, _ = pool_with_cached_chain(1, 1)
    pool.allocate(1)
    assert pool.match([name(0)]) == []
    pool.check_integrity()


def test_of_two_blocks_with_one_hash_the_first_stays_canonical():
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    assert pool.seal(first, name(0))
    assert not pool.seal(second, name(0))
    pool.release([first, second])
    assert pool.state(first) is BlockState.CACHED
    assert pool.state(second) is BlockState.FREE
    assert pool.match([name(0)]) == [first]


def test_sealing_again_under_the_same_hash_changes_nothing():
    pool = BlockPool(1)
    (block_id,) = pool.allocate(1)
    assert pool.seal(block_id, name(0))
    assert pool.seal(block_id, name(0))
    pool.check_integrity()


def test_sealing_under_another_hash_or_unheld_is_refused():
    pool = BlockPool(2)
    (block_id,) = pool.allocate(1)
    pool.seal(block_id, name(0))
    with pytest.raises(InternalError, match="already sealed"):
        pool.seal(block_id, name(1))
    with pytest.raises(InternalError, match="seal of block 1"):
        pool.seal(BlockId(1), name(1))


def test_the_integrity_check_notices_broken_bookkeeping():
    pool = BlockPool(2)
    pool._free.append(BlockId(0))
    with pytest.raises(InternalError, match="free list twice"):
        pool.check_integrity()


def test_a_run_that_is_sealed_together_is_told_together():
    pool, told = BlockPool(3), []
    pool.watch(told.append)
    pool.seal_run(pool.allocate(3), [name(1), name(2), name(3)], name(0))
    assert told == [BlocksStored((name(1), name(2), name(3)), name(0))]
    assert pool.match([name(1), name(2), name(3)]) == [0, 1, 2]


def test_a_run_is_told_in_pieces_around_blocks_that_were_known_before():
    pool, told = BlockPool(5), []
    pool.seal(pool.allocate(1)[0], name(2))
    run = pool.allocate(4)
    pool.watch(told.append)
    pool.seal_run(run, [name(1), name(2), name(3), name(4)])
    assert told == [BlocksStored((name(1),), None), BlocksStored((name(3), name(4)), name(2))]
    pool.release(run)
    assert pool.state(run[1]) is BlockState.FREE
    pool.check_integrity()


def test_nothing_is_sealed_of_a_run_with_a_block_that_nobody_holds():
    pool, told = BlockPool(2), []
    pool.watch(told.append)
    (held,) = pool.allocate(1)
    with pytest.raises(InternalError, match="seal of block 1, which is free"):
        pool.seal_run([held, BlockId(1)], [name(0), name(1)])
    assert not told and pool.match([name(0)]) == []
    pool.check_integrity()


def test_a_run_is_sealed_up_to_a_block_that_has_another_name():
    pool, told = BlockPool(2), []
    first, second = pool.allocate(2)
    pool.seal(second, name(9))
    pool.watch(told.append)
    with pytest.raises(InternalError, match="block 1 is already sealed"):
        pool.seal_run([first, second], [name(0), name(1)])
    assert told == [BlocksStored((name(0),), None)]
    pool.check_integrity()


def test_releasing_a_block_more_often_than_it_is_held_is_refused():
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    with pytest.raises(InternalError, match="more often than it is held"):
        pool.release(blocks * 2)
    pool.check_integrity()


def test_blocks_evicted_together_are_told_together():
    pool, chain = pool_with_cached_chain(3, 3)
    told = []
    pool.watch(told.append)
    pool.allocate(2)
    assert told == [BlocksRemoved((name(2), name(1)))]
