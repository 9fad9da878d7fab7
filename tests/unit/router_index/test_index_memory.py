"""The index's budget, what it gives up for it, and what it leaves behind."""

import gc
import tracemalloc

from index_names import depths, names

from kelp.core.clock import FakeClock
from kelp.core.kv_events import BlocksCleared, BlocksStored
from kelp.core.types import SequenceHash, Tier
from kelp.router.index.kv_index import MIN_BYTES, KVIndex
from kelp.router.index.sharing import shared_slot


def _fresh(first, count):
    return tuple(SequenceHash(number.to_bytes(16, "little")) for number in range(first, first + count))


def _traced(fill):
    gc.collect()
    tracemalloc.start()
    try:
        index = KVIndex(FakeClock())
        fill(index)
        gc.collect()
        return tracemalloc.get_traced_memory()[0], index.num_bytes, index
    finally:
        tracemalloc.stop()


def _fill_long(index):
    for number in range(200):
        index.apply(number % 8, BlocksStored(_fresh(number * 300, 300), None))


def _fill_short(index):
    for number in range(4000):
        index.apply(number % 64, BlocksStored(_fresh(number * 2, 2), None))


def _fill_shared(index):
    for slot in range(100):
        index.apply(slot, BlocksStored(_fresh(0, 100 + slot), None))
    index.match(_fresh(0, 500))


def _fill_expected(index):
    for number in range(3000):
        index.expect(number % 64, _fresh(number * 4, 4))


def _fill_below(index):
    for slot in range(64):
        index.share(slot, shared_slot(slot // 8))
    for number in range(500):
        index.apply(shared_slot(number % 8), BlocksStored(_fresh(number * 50, 50), None, Tier.HOST))
        index.apply(number % 64, BlocksStored(_fresh(number * 50, 50), None))
        index.match(_fresh(number * 50, 50))


def test_the_estimate_is_near_what_the_allocator_says_and_not_below_it():
    for fill in (_fill_long, _fill_short, _fill_shared, _fill_expected, _fill_below):
        traced, said, _ = _traced(fill)
        assert traced <= said * 1.05, fill.__name__
        assert said <= traced * 2.5 + 20_000, fill.__name__


def test_memory_returns_to_where_it_was_when_all_workers_have_gone():
    def fill_and_leave(index):
        _fill_long(index)
        _fill_short(index)
        for slot in range(64):
            index.expect(slot, _fresh(10**6 + slot * 100, 100))
            index.match(_fresh(0, 100))
            index.clear(slot)

    traced, said, index = _traced(fill_and_leave)
    assert index.num_blocks == 0
    assert traced < 64_000 and said < 64_000


def test_beyond_the_budget_chains_that_nothing_matched_are_forgotten_first():
    index = KVIndex(FakeClock(), max_bytes=MIN_BYTES * 4)
    hot = names(64, "hot")
    index.apply(0, BlocksStored(hot, None))
    for number in range(300):
        index.apply(1, BlocksStored(_fresh(number * 40, 40), None))
        assert depths(index.match(hot)) == {0: 64}
        assert index.num_bytes <= MIN_BYTES * 4
    assert index.num_forgotten_blocks > 0
    assert depths(index.match(_fresh(0, 40))) == {}
    assert depths(index.match(_fresh(299 * 40, 40))) == {1: 40}


def test_workers_whose_blocks_were_forgotten_count_as_truncated_until_they_start_over():
    index = KVIndex(FakeClock(), max_bytes=MIN_BYTES)
    for number in range(60):
        index.apply(number % 2, BlocksStored(_fresh(number * 40, 40), None))
    assert index.is_truncated(0) and index.is_truncated(1)
    index.apply(0, BlocksCleared())
    index.clear(1)
    assert not index.is_truncated(0) and not index.is_truncated(1)


def test_one_event_larger_than_the_budget_is_not_kept():
    index = KVIndex(FakeClock(), max_bytes=MIN_BYTES)
    huge = _fresh(0, 20_000)
    index.apply(0, BlocksStored(huge, None))
    assert index.num_bytes <= MIN_BYTES
    assert index.is_truncated(0)
    assert depths(index.match(huge)).get(0, 0) < 20_000


def test_expectations_have_an_eighth_of_the_budget_and_the_oldest_end_first():
    clock = FakeClock()
    index = KVIndex(clock, max_bytes=MIN_BYTES * 16)
    for number in range(400):
        clock.advance(0.01)
        index.expect(number % 4, _fresh(number * 4, 4))
    assert index.num_predictions_cut_short > 0
    assert depths(index.match(_fresh(0, 4))) == {}
    assert depths(index.match(_fresh(399 * 4, 4))) == {3: 4}
