"""What the index says after events, in examples; `tests/property/test_index_property.py` has the rest."""

import pytest
from index_names import depths, names, rows

from kelp.core.clock import FakeClock
from kelp.core.errors import ConfigError
from kelp.core.kv_events import BlocksCleared, BlocksRemoved, BlocksStored
from kelp.core.types import Tier
from kelp.router.index import kv_index
from kelp.router.index.kv_index import KVIndex
from kelp.router.index.sharing import shared_slot

_A = names(600)


@pytest.fixture
def index():
    return KVIndex(FakeClock())


def test_an_empty_index_and_an_empty_prompt_match_nobody(index):
    assert rows(index.match(_A)) == {}
    index.apply(0, BlocksStored(_A, None))
    assert rows(index.match(())) == {}


def test_workers_match_as_far_as_they_hold_a_prompt_without_gap(index):
    index.apply(0, BlocksStored(_A, None))
    index.apply(1, BlocksStored(_A[:100], None))
    index.apply(2, BlocksStored(_A[:100], None))
    index.apply(2, BlocksRemoved((_A[40],)))
    index.apply(3, BlocksStored(_A[1:100], _A[0]))
    assert depths(index.match(_A)) == {0: 600, 1: 100, 2: 40}
    assert depths(index.match(_A[:30])) == {0: 30, 1: 30, 2: 30}


def test_a_gap_that_is_filled_counts_again_with_all_that_follows(index):
    index.apply(5, BlocksStored(_A[:100], None))
    index.apply(5, BlocksRemoved((_A[40],)))
    index.apply(5, BlocksStored((_A[40],), _A[39]))
    assert depths(index.match(_A)) == {5: 100}


def test_blocks_that_came_before_their_parent_count_once_it_is_there(index):
    index.apply(0, BlocksStored(_A[10:20], _A[9]))
    assert depths(index.match(_A)) == {}
    index.apply(1, BlocksStored(_A[:30], None))
    index.apply(0, BlocksStored(_A[:10], None))
    assert depths(index.match(_A)) == {0: 20, 1: 30}


def test_a_prompt_matches_up_to_where_it_differs(index):
    other = (*_A[:50], *names(50, "other"))
    index.apply(0, BlocksStored(_A, None))
    index.apply(1, BlocksStored(other, None))
    assert depths(index.match(other)) == {0: 50, 1: 100}
    assert depths(index.match((*_A[:20], *names(5, "third")))) == {0: 20, 1: 20}


def test_tiers_count_with_the_faster_ones(index):
    index.apply(0, BlocksStored(_A[:10], None))
    index.apply(0, BlocksStored(_A[10:20], _A[9], Tier.HOST))
    index.apply(0, BlocksStored(_A[15:40], _A[14], Tier.OBJECT))
    index.apply(1, BlocksStored(_A[:5], None, Tier.DISK))
    assert rows(index.match(_A)) == {0: (10, 20, 20, 40, 0), 1: (0, 0, 5, 5, 0)}
    index.apply(0, BlocksRemoved(_A[:10], Tier.HOST))
    assert rows(index.match(_A))[0] == (10, 20, 20, 40, 0)
    index.apply(0, BlocksRemoved(_A[:10]))
    assert rows(index.match(_A)) == {1: (0, 0, 5, 5, 0)}


def test_blocks_of_a_manager_count_for_each_of_its_workers_and_fill_the_gaps_of_their_own(index):
    manager, other = shared_slot(0), shared_slot(1)
    for slot, holder in ((0, manager), (1, manager), (2, other), (3, None)):
        index.share(slot, holder)
    index.apply(0, BlocksStored(_A[:10], None))
    index.apply(2, BlocksStored(_A[:10], None))
    index.apply(manager, BlocksStored(_A[5:30], _A[4], Tier.HOST))
    index.apply(manager, BlocksStored(_A[30:50], _A[29], Tier.DISK))
    assert rows(index.match(_A)) == {0: (10, 30, 50, 50, 0), 2: (10, 10, 10, 10, 0)}
    index.apply(manager, BlocksStored(_A[:5], None, Tier.OBJECT))
    assert rows(index.match(_A)) == {0: (10, 30, 50, 50, 0), 1: (0, 0, 0, 50, 0), 2: (10, 10, 10, 10, 0)}
    index.apply(0, BlocksRemoved(_A[2:4]))
    assert rows(index.match(_A))[0] == (2, 2, 2, 50, 0)


def test_a_worker_has_its_managers_blocks_only_while_it_is_its_worker(index):
    index.apply(shared_slot(0), BlocksStored(_A[:10], None, Tier.HOST))
    index.apply(shared_slot(1), BlocksStored(_A[:20], None, Tier.HOST))
    assert rows(index.match(_A)) == {}
    index.share(7, shared_slot(0))
    assert rows(index.match(_A)) == {7: (0, 10, 10, 10, 0)}
    index.share(7, shared_slot(1))
    assert rows(index.match(_A)) == {7: (0, 20, 20, 20, 0)}
    index.share(7, None)
    assert rows(index.match(_A)) == {}


def test_a_manager_that_claims_device_blocks_is_nobodys_device(index):
    index.share(0, shared_slot(0))
    index.apply(shared_slot(0), BlocksStored(_A[:10], None, Tier.DEVICE))
    assert rows(index.match(_A)) == {}
    index.apply(shared_slot(0), BlocksStored(_A[:5], None, Tier.HOST))
    assert rows(index.match(_A)) == {0: (0, 5, 5, 5, 0)}


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.OBJECT])
def test_a_cleared_worker_and_a_new_one_in_its_slot_hold_nothing(index, tier):
    index.apply(0, BlocksStored(_A, None, tier))
    index.apply(1, BlocksStored(_A[:3], None, tier))
    index.apply(0, BlocksCleared())
    assert set(rows(index.match(_A))) == {1}
    index.clear(1)
    assert rows(index.match(_A)) == {}
    assert index.num_blocks == 0


def test_removals_of_unknown_blocks_are_ignored(index):
    index.apply(0, BlocksStored(_A[:10], None))
    index.apply(0, BlocksRemoved((*names(3, "never seen"), _A[9])))
    index.apply(1, BlocksRemoved(_A[:10]))
    assert depths(index.match(_A)) == {0: 9}


def test_a_worker_that_names_a_block_twice_cannot_break_the_index(index):
    index.apply(0, BlocksStored((_A[0], _A[1], _A[0], _A[2]), None))
    index.apply(1, BlocksStored(_A[:10], None))
    assert depths(index.match(_A))[1] == 10
    index.clear(0)
    index.clear(1)
    assert index.num_blocks == 0


def test_what_one_worker_invents_never_makes_another_hold_more(index):
    index.apply(0, BlocksStored((_A[0], *names(1, "lie"), _A[2]), None))
    index.apply(1, BlocksStored(_A[:10], None))
    assert depths(index.match(_A))[1] <= 10
    index.clear(0)
    index.apply(1, BlocksCleared())
    index.apply(1, BlocksStored(_A[:10], None))
    assert depths(index.match(_A)) == {1: 10}


def test_holdings_lists_what_a_worker_has_in_one_tier(index):
    index.apply(0, BlocksStored(_A[:10], None))
    index.apply(0, BlocksRemoved((_A[4],)))
    index.apply(0, BlocksStored(_A[4:6], _A[3], Tier.HOST))
    assert set(index.holdings(0, Tier.DEVICE)) == set(_A[:10]) - {_A[4]}
    assert set(index.holdings(0, Tier.HOST)) == set(_A[4:6])
    assert list(index.holdings(1, Tier.DEVICE)) == []


def test_hundreds_of_workers_share_a_prefix(index):
    for slot in range(300):
        index.apply(slot, BlocksStored(_A[: 100 + slot], None))
    found = depths(index.match(_A[:250]))
    assert found == {slot: min(250, 100 + slot) for slot in range(300)}


def test_a_budget_too_small_for_any_prompt_is_refused():
    with pytest.raises(ConfigError, match="max_bytes"):
        KVIndex(max_bytes=kv_index.MIN_BYTES - 1)
