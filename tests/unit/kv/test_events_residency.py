"""What the publisher remembers, and how it tells changes in few events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kelp.core.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent
from kelp.core.types import Tier
from kelp.kv.events.residency import Residency, StreamDigest, split
from support.event_doubles import SetIndex, digest16

A, B, C, D = map(digest16, range(4))


def changes_of(*events: KVEvent, residency: Residency | None = None) -> list[KVEvent]:
    residency = residency or Residency()
    for event in events:
        residency.apply(event)
    return residency.take_changes()


def test_interleaved_sequences_become_one_run_each() -> None:
    events = [BlocksStored((A,), None), BlocksStored((C,), None), BlocksStored((B,), A), BlocksStored((D,), C)]
    assert changes_of(*events) == [BlocksStored((A, B), None), BlocksStored((C, D), None)]


def test_a_fork_becomes_a_run_of_its_own() -> None:
    assert changes_of(BlocksStored((A, B), None), BlocksStored((C,), A)) == [
        BlocksStored((A, B), None),
        BlocksStored((C,), A),
    ]


def test_removals_are_joined_and_come_first() -> None:
    residency = Residency()
    changes_of(BlocksStored((A, B), None), residency=residency)
    events = [BlocksRemoved((B,)), BlocksStored((C,), None), BlocksRemoved((A,))]
    assert changes_of(*events, residency=residency) == [BlocksRemoved((B, A)), BlocksStored((C,), None)]


def test_what_cancels_out_is_not_told() -> None:
    residency = Residency()
    changes_of(BlocksStored((A,), None), residency=residency)
    events = [BlocksStored((A,), None), BlocksStored((B,), A), BlocksRemoved((B, A, C)), BlocksStored((A,), None)]
    assert changes_of(*events, residency=residency) == []


def test_clearing_comes_before_what_was_stored_after_it() -> None:
    events = [BlocksStored((A,), None), BlocksCleared(), BlocksStored((B,), None, Tier.DISK)]
    assert changes_of(*events) == [BlocksCleared(), BlocksStored((B,), None, Tier.DISK)]


def test_long_events_are_cut_and_keep_their_parents() -> None:
    batches = list(split([BlocksStored((A, B, C), D), BlocksRemoved((A, B, C))], 2))
    assert batches == [
        [BlocksStored((A, B), D)],
        [BlocksStored((C,), B)],
        [BlocksRemoved((A, B))],
        [BlocksRemoved((C,))],
    ]


EVENTS = st.lists(
    st.one_of(
        st.builds(
            BlocksStored,
            st.lists(st.integers(0, 9), min_size=1, max_size=4).map(lambda blocks: tuple(map(digest16, blocks))),
            st.none(),
            st.sampled_from(Tier),
        ),
        st.builds(BlocksRemoved, st.integers(0, 9).map(lambda block: (digest16(block),)), st.sampled_from(Tier)),
        st.just(BlocksCleared()),
    )
)


@given(st.lists(EVENTS, max_size=6))
def test_the_changes_lead_to_what_the_events_lead_to_and_so_does_the_digest(batches: list[list[KVEvent]]) -> None:
    residency, plain, told, digest = Residency(), SetIndex(), SetIndex(), StreamDigest()
    for batch in batches:
        for event in batch:
            plain.apply(0, event)
        changes = changes_of(*batch, residency=residency)
        digest.apply(changes)
        for event in changes:
            told.apply(0, event)
        assert told.held() == plain.held()
        assert digest.tiers() == residency.digest()
    afresh = StreamDigest()
    afresh.apply(BlocksStored((block,), None, tier) for tier, block in sorted(plain.held()))
    assert afresh.tiers() == residency.digest()
