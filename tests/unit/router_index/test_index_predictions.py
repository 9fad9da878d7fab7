"""What is expected of workers, and how expectations end."""

import pytest
from index_names import names, rows

from kelp.core.clock import FakeClock
from kelp.core.kv_events import BlocksCleared, BlocksRemoved, BlocksStored
from kelp.core.types import Tier
from kelp.router.index.kv_index import KVIndex

_A = names(20)
_TTL_S = 120.0


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def index(clock):
    return KVIndex(clock)


def test_a_prompt_counts_as_soon_as_it_is_sent(index):
    index.expect(0, _A)
    assert rows(index.match(_A)) == {0: (20, 20, 20, 20, 20)}


def test_only_what_is_not_known_counts_as_predicted(index):
    index.apply(0, BlocksStored(_A[:8], None))
    index.expect(0, _A)
    assert rows(index.match(_A)) == {0: (20, 20, 20, 20, 12)}


def test_the_workers_own_event_confirms_block_by_block(index, clock):
    index.expect(0, _A)
    index.apply(0, BlocksStored(_A[:5], None))
    assert rows(index.match(_A)) == {0: (20, 20, 20, 20, 15)}
    clock.advance(_TTL_S)
    assert rows(index.match(_A)) == {0: (5, 5, 5, 5, 0)}


def test_an_event_of_another_worker_or_tier_confirms_nothing(index):
    index.expect(0, _A)
    index.apply(1, BlocksStored(_A[:5], None))
    index.apply(0, BlocksStored(_A[:6], None, Tier.HOST))
    assert rows(index.match(_A)) == {0: (20, 20, 20, 20, 20), 1: (5, 5, 5, 5, 0)}


@pytest.mark.parametrize("event", [BlocksRemoved(_A[10:]), BlocksCleared()])
def test_the_workers_own_event_contradicts(index, event):
    index.expect(0, _A)
    index.apply(0, event)
    assert rows(index.match(_A)) == ({0: (10,) * 5} if isinstance(event, BlocksRemoved) else {})


def test_an_expectation_ends_after_its_time_and_a_newer_one_later(index, clock):
    index.expect(0, _A)
    clock.advance(_TTL_S / 2)
    index.expect(0, _A[:8])
    clock.advance(_TTL_S / 2 - 1)
    assert rows(index.match(_A)) == {0: (20,) * 5}
    clock.advance(1)
    assert rows(index.match(_A)) == {0: (8,) * 5}
    clock.advance(_TTL_S / 2)
    assert rows(index.match(_A)) == {}
    assert index.num_blocks == 0


def test_a_request_that_failed_takes_its_expectation_back(index):
    index.apply(0, BlocksStored(_A[:4], None))
    index.expect(0, _A)
    index.retract(0, _A)
    assert rows(index.match(_A)) == {0: (4, 4, 4, 4, 0)}


def test_thousands_of_confirmed_expectations_leave_nothing_behind(index, clock):
    for number in range(3000):
        clock.advance(0.001)
        prompt = names(2, str(number % 50))
        index.expect(number % 7, prompt)
        index.apply(number % 7, BlocksStored(prompt, None))
        index.apply(number % 7, BlocksRemoved(prompt))
    assert index.num_blocks == 0
    assert index.num_bytes < 64_000


def test_a_prompt_that_repeats_a_block_harms_nothing(index, clock):
    index.expect(0, _A[:2])
    index.expect(0, (*_A[:3], _A[0], *_A[3:5]))
    assert rows(index.match(_A)) == {0: (5, 5, 5, 5, 5)}
    clock.advance(_TTL_S)
    assert rows(index.match(_A)) == {}
    assert index.num_blocks == 0
    index.expect(0, _A)
    assert rows(index.match(_A)) == {0: (20, 20, 20, 20, 20)}
