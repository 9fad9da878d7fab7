"""What is remembered of the store: failures, groups, and a pass over its objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kelp.core.clock import FakeClock
from kelp.core.types import SequenceHash
from kelp.kv.tiers.objects.breaker import LONGEST_RETRY_S, CircuitBreaker
from kelp.kv.tiers.objects.known import KnownGroups
from kelp.kv.tiers.objects.messages import Listed
from kelp.kv.tiers.objects.sweep import Quota, Sweep

TENANT, OTHER = b"t" * 16, b"o" * 16


def _name(number: int) -> SequenceHash:
    return SequenceHash(number.to_bytes(16, "big"))


def _breaker() -> tuple[CircuitBreaker, FakeClock]:
    clock = FakeClock()
    return CircuitBreaker(3, 5.0, clock), clock


def test_only_failures_in_a_row_open_the_breaker() -> None:
    breaker, _ = _breaker()
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert breaker.state == "closed"
    for _ in range(3):
        breaker.failed()
    assert breaker.state == "open"
    assert breaker.is_open


def test_a_probe_that_succeeds_closes_it() -> None:
    breaker, clock = _breaker()
    for _ in range(3):
        breaker.failed()
    clock.advance(4.9)
    assert breaker.is_open
    clock.advance(0.2)
    assert breaker.state == "half-open"
    assert not breaker.is_open
    breaker.succeeded()
    assert breaker.state == "closed"


def test_the_wait_doubles_up_to_a_minute_and_starts_over_after_a_success() -> None:
    breaker, clock = _breaker()
    for _ in range(3):
        breaker.failed()
    waits = []
    for _ in range(7):
        start_s = clock.monotonic_s()
        while breaker.is_open:
            clock.advance(0.5)
        waits.append(clock.monotonic_s() - start_s)
        breaker.failed()
    assert waits == [5, 10, 20, 40, LONGEST_RETRY_S, LONGEST_RETRY_S, LONGEST_RETRY_S]
    breaker.succeeded()
    for _ in range(3):
        breaker.failed()
    clock.advance(5)
    assert not breaker.is_open


def test_the_least_recently_used_group_is_forgotten_first() -> None:
    known = KnownGroups(FakeClock(), max_groups=3)
    for number in range(3):
        known.add(TENANT, _name(number))
    known.use(_name(0))
    known.add(TENANT, _name(3))
    assert [_name(number) in known for number in range(4)] == [True, False, True, True]
    assert len(known) == 3


def test_members_name_their_group_as_long_as_it_is_known() -> None:
    known = KnownGroups(FakeClock())
    known.add(TENANT, _name(3))
    assert known.end_of(_name(1)) is None
    known.add(TENANT, _name(3), [_name(1), _name(2), _name(3)])
    assert known.end_of(_name(1)) == known.end_of(_name(3)) == _name(3)
    assert list(known) == [(_name(1), _name(2), _name(3))]
    known.discard(_name(3))
    assert known.end_of(_name(1)) is None
    assert known.end_of(_name(3)) is None


def test_absence_is_remembered_for_a_while_and_ends_with_a_write() -> None:
    clock = FakeClock()
    known = KnownGroups(clock, absent_ttl_s=30)
    known.note_absent(_name(1))
    assert known.is_absent(_name(1))
    clock.advance(30)
    assert not known.is_absent(_name(1))
    known.note_absent(_name(1))
    known.add(TENANT, _name(1))
    assert not known.is_absent(_name(1))
    assert _name(1) in known


def test_a_listing_keeps_what_was_added_while_it_ran() -> None:
    known = KnownGroups(FakeClock())
    for number in (1, 2):
        known.add(TENANT, _name(number))
    known.start_listing()
    known.add(TENANT, _name(3))
    known.use(_name(2))
    known.keep({_name(1): TENANT})
    assert sorted(known) == [(_name(1),), (_name(3),)]


def test_a_tenant_is_forgotten_and_nobody_else() -> None:
    known = KnownGroups(FakeClock())
    known.add(TENANT, _name(1))
    known.add(OTHER, _name(2))
    known.forget(TENANT)
    assert list(known) == [(_name(2),)]
    known.forget(None)
    assert list(known) == []


def _swept(quota: Quota, objects: Sequence[tuple[int, int, int]]) -> Sweep:
    """A pass over objects: when each was written, its size, and whose it is; its key is its number."""
    sweep = Sweep(quota)
    for index, (modified_s, num_bytes, owner) in enumerate(objects):
        sweep.add(Listed(str(index), num_bytes, modified_s), bytes([owner]) * 16)
    return sweep


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 100)), max_size=60), st.integers(1, 3000))
def test_the_oldest_objects_make_room_and_no_more_than_needed(objects: list[tuple[int, int]], max_bytes: int) -> None:
    sweep = _swept(Quota(max_bytes), [(*item, 0) for item in objects])
    surplus = [int(key) for key in sweep.surplus()]
    total = sum(num_bytes for _, num_bytes in objects)
    left = total - sum(objects[index][1] for index in surplus)
    assert left <= max_bytes
    assert bool(surplus) == (total > max_bytes)
    if surplus:
        assert left + objects[surplus[-1]][1] > 0.95 * max_bytes, "one less would have been too few"
        kept = set(range(len(objects))) - set(surplus)
        assert all(objects[index][0] <= objects[other][0] for index in surplus for other in kept)


def test_without_a_quota_nothing_is_surplus() -> None:
    assert _swept(Quota(0, 0.5), [(0, 10**15, 1)]).surplus() == []


_OBJECTS = st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 100), st.integers(0, 3)), max_size=60)


@given(_OBJECTS, st.integers(1, 3000), st.floats(0.01, 0.99))
def test_a_tenant_beyond_its_share_makes_room_before_anybody_else(
    objects: list[tuple[int, int, int]], max_bytes: int, share: float
) -> None:
    quota = Quota(max_bytes, share)
    sweep = _swept(quota, objects)
    surplus = [int(key) for key in sweep.surplus()]
    assert len(set(surplus)) == len(surplus)
    sums = Counter[int]()
    for _, num_bytes, owner in objects:
        sums[owner] += num_bytes
    greedy = {owner for owner, num_bytes in sums.items() if num_bytes > share * max_bytes}

    left, after_shares = Counter(sums), Counter(sums)
    for index in surplus:
        _, num_bytes, owner = objects[index]
        if owner not in greedy or after_shares[owner] <= 0.95 * share * max_bytes:
            assert after_shares.total() > 0.95 * max_bytes, "of others only what is beyond the whole quota"
        else:
            after_shares[owner] -= num_bytes
        left[owner] -= num_bytes
    kept = [item for index, item in enumerate(objects) if index not in set(surplus)]
    for owner in greedy:
        num_kept = sum(item[2] == owner for item in kept)
        assert left[owner] <= share * max_bytes or num_kept == 1, "one object may be larger than the share"
    assert left.total() <= max_bytes
    if sums.total() <= max_bytes:
        assert {objects[index][2] for index in surplus} <= greedy
    for index in surplus:
        rivals = [item for item in kept if item[2] == objects[index][2]]
        assert all(objects[index][0] <= item[0] for item in rivals), "of each tenant the oldest"


def test_a_young_tenant_beyond_its_share_does_not_push_out_older_ones() -> None:
    objects = [(0, 10, 0)] * 3 + [(100 + index, 10, 1) for index in range(9)]
    sweep = _swept(Quota(100, 0.5), objects)
    assert sweep.surplus() == [str(index) for index in range(3, 8)]
    assert sweep.full_tenants() == {bytes([1]) * 16}
    assert _swept(Quota(100, 1.0), objects).full_tenants() == frozenset(), "a share of 1 bounds nobody"


def test_of_very_many_tenants_those_with_most_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kelp.kv.tiers.objects.sweep._MAX_TRACKED", 20)
    small = [(index, 1, 10 + index) for index in range(60)]
    large = [(1000 + index, 10, 1) for index in range(10)]
    sweep = _swept(Quota(1000, 0.05), [*small[:30], *large, *small[30:]])
    assert sweep._num_tracked == sum(len(tenant.oldest) for tenant in sweep._tenants.values()) <= 20
    assert [int(key) for key in sweep.surplus()] == [30, 31, 32, 33, 34, 35]
