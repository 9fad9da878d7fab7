from __future__ import annotations

import pytest

from kelp.core.clock import FakeClock
from kelp.kv.tiers.admission import OfferFilter, WriteBudget
from support.tier_rig import name


@pytest.mark.parametrize("min_offers", [1, 2, 5])
def test_a_block_is_admitted_with_its_last_needed_offer(min_offers: int) -> None:
    offers = OfferFilter(min_offers, max_known=10)
    assert [offers.admits(name(1)) for _ in range(min_offers)] == [False] * (min_offers - 1) + [True]


def test_what_was_not_offered_for_longest_is_forgotten() -> None:
    offers = OfferFilter(2, max_known=2)
    for number in (1, 2, 3):
        assert not offers.admits(name(number))
    assert not offers.admits(name(1))
    assert offers.admits(name(3))


def test_a_budget_is_spent_and_comes_back_with_time() -> None:
    clock = FakeClock()
    budget = WriteBudget(1000, min_burst_bytes=100, clock=clock)
    assert budget.allows(600)
    assert not budget.allows(600)
    clock.advance(0.2)
    assert budget.allows(600)
    clock.advance(100.0)
    assert budget.allows(1000)
    assert not budget.allows(1)


def test_a_block_larger_than_a_second_of_budget_passes_in_time() -> None:
    clock = FakeClock()
    budget = WriteBudget(10, min_burst_bytes=100, clock=clock)
    assert budget.allows(100)
    clock.advance(9.0)
    assert not budget.allows(100)
    clock.advance(1.0)
    assert budget.allows(100)


def test_no_bound_allows_everything() -> None:
    budget = WriteBudget(0, min_burst_bytes=1, clock=FakeClock())
    assert all(budget.allows(2**40) for _ in range(10))


def test_a_block_that_was_admitted_and_not_written_stays_admitted() -> None:
    offers = OfferFilter(2, max_known=10)
    assert not offers.admits(name(1))
    assert not offers.has_admitted(name(1)), "one offer more is needed"
    assert offers.admits(name(1))
    offers.restore(name(1))
    assert offers.has_admitted(name(1))
    assert offers.admits(name(1))
    assert OfferFilter(1, max_known=1).has_admitted(name(2)), "one offer is enough"
