import hashlib
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kelp.core.clock import FakeClock
from kelp.core.kv_events import BlocksCleared, BlocksRemoved, BlocksStored
from kelp.core.types import SequenceHash, Tier
from kelp.router.index import chain_store
from kelp.router.index.kv_index import KVIndex
from kelp.router.index.sharing import shared_slot
from support.examples import examples

_NUM_SLOTS = 4
_MANAGERS = (shared_slot(0), shared_slot(1))
_HOLDERS = (*range(_NUM_SLOTS), *_MANAGERS)
_DEPTH = 9
_TTL_S = 10.0

# One trunk with short twigs everywhere, so that most histories meet in the same few sequences.
_tokens = st.builds(lambda trunk, twig: [0] * trunk + [1] * twig, st.integers(1, _DEPTH), st.sampled_from([0, 0, 1, 2]))
_slots = st.integers(0, _NUM_SLOTS - 1)
_holders = st.sampled_from((*range(_NUM_SLOTS), *_MANAGERS, *_MANAGERS))
_tiers = st.sampled_from(Tier)
_stored = st.tuples(st.just("store"), _holders, _tiers, _tokens, st.sampled_from([0, 0, 0, 1, 2, 5]))
_removed = st.tuples(st.just("remove"), _holders, _tiers, st.lists(_tokens, min_size=1, max_size=6))
_removed_run = st.tuples(st.just("remove_run"), _holders, _tiers, _tokens, st.booleans())
_expected = st.tuples(st.sampled_from(["expect", "retract"]), _slots, _tokens)
_cleared = st.tuples(st.sampled_from(["clear", "cleared"]), _holders)
_shared = st.tuples(st.just("share"), _slots, st.sampled_from((None, *_MANAGERS, *_MANAGERS)))
_waited = st.tuples(st.just("wait"), st.sampled_from([1.0, 4.0, _TTL_S]))
_matched = st.tuples(st.just("match"), _tokens)
_all_shared = [("share", slot, _MANAGERS[slot // 2]) for slot in range(_NUM_SLOTS)]
_histories = st.lists(
    st.one_of(
        _stored, _stored, _stored, _removed, _removed_run, _expected, _expected, _cleared, _waited, _matched, _shared
    ),
    max_size=40,
)
_steps = st.builds(lambda first, steps: [*first, *steps], st.sampled_from([[], _all_shared]), _histories)


def _names(tokens):
    """Names of a branch of a binary tree of sequences, root first."""
    return tuple(
        SequenceHash(hashlib.blake2b(bytes(tokens[: end + 1]), digest_size=16).digest()) for end in range(len(tokens))
    )


class _Truth:
    """The same contract, asking every worker and its manager for every block."""

    def __init__(self, clock):
        self.clock = clock
        self.held = {slot: {tier: set() for tier in Tier} for slot in _HOLDERS}
        self.expected = {slot: {} for slot in _HOLDERS}
        self.manager_of = {}

    def apply(self, slot, event):
        if isinstance(event, BlocksCleared):
            self.clear(slot)
        elif isinstance(event, BlocksStored):
            self.held[slot][event.tier].update(event.hashes)
        else:
            self.held[slot][event.tier].difference_update(event.hashes)
        if not isinstance(event, BlocksCleared) and event.tier == Tier.DEVICE:
            self.retract(slot, event.hashes)

    def clear(self, slot):
        self.held[slot] = {tier: set() for tier in Tier}
        self.expected[slot] = {}

    def expect(self, slot, hashes):
        deadline_s = self.clock.monotonic_s() + _TTL_S
        self.expected[slot].update({name: deadline_s for name in hashes if name not in self.held[slot][Tier.DEVICE]})

    def retract(self, slot, hashes):
        for name in hashes:
            self.expected[slot].pop(name, None)

    def share(self, slot, manager):
        self.manager_of[slot] = manager

    def match(self, hashes):
        rows = {}
        for slot in range(_NUM_SLOTS):
            manager = self.manager_of.get(slot)
            reachable = {name for name, end_s in self.expected[slot].items() if end_s > self.clock.monotonic_s()}
            depths = []
            for tier in Tier:
                reachable |= self.held[slot][tier]
                if manager is not None and tier != Tier.DEVICE:
                    reachable |= self.held[manager][tier]
                depths.append(_leading(hashes, reachable))
            if depths[-1]:
                rows[slot] = (*depths, depths[0] - _leading(hashes, self.held[slot][Tier.DEVICE]))
        return rows


def _leading(hashes, members):
    return next((depth for depth, name in enumerate(hashes) if name not in members), len(hashes))


def _rows(matches):
    assert matches.blocks.dtype == np.int32 and matches.predicted.dtype == np.int32
    assert matches.blocks.shape == (len(matches.slots), len(Tier))
    rows = {
        int(slot): (*map(int, blocks), int(predicted))
        for slot, blocks, predicted in zip(matches.slots, matches.blocks, matches.predicted, strict=True)
    }
    assert len(rows) == len(matches.slots)
    return rows


def _run(step, target):
    kind = step[0]
    if kind == "store":
        _, slot, tier, tokens, first = step
        names = _names(tokens)
        first = min(first, len(names) - 1)
        target.apply(slot, BlocksStored(names[first:], names[first - 1] if first else None, tier))
    elif kind == "remove":
        _, slot, tier, branches = step
        target.apply(slot, BlocksRemoved(tuple(_names(tokens)[-1] for tokens in branches), tier))
    elif kind == "remove_run":
        _, slot, tier, tokens, is_backwards = step
        names = _names(tokens)
        target.apply(slot, BlocksRemoved(names[::-1] if is_backwards else names, tier))
    elif kind in ("expect", "retract"):
        getattr(target, kind)(step[1], _names(step[2]))
    elif kind == "clear":
        target.clear(step[1])
    elif kind == "share":
        target.share(step[1], step[2])
    else:
        target.apply(step[1], BlocksCleared())


@settings(max_examples=examples(75), deadline=None)
@given(steps=_steps, chain_blocks=st.sampled_from([1, 3, 256]), growing_cells=st.sampled_from([0, 1, 8]))
def test_the_index_equals_asking_every_worker_and_its_manager_for_every_block_after_any_history(
    steps, chain_blocks, growing_cells
):
    clock = FakeClock()
    truth, index = _Truth(clock), KVIndex(clock, ttl_s=_TTL_S)
    branches = set()
    with (
        mock.patch.object(chain_store, "MAX_CHAIN_BLOCKS", chain_blocks),
        mock.patch.object(chain_store, "MAX_GROWING_CELLS", growing_cells),
    ):
        for step in steps:
            if step[0] == "wait":
                clock.advance(step[1])
                continue
            if step[0] == "match":
                branches.add(tuple(step[1]))
            else:
                _run(step, truth)
                _run(step, index)
            for branch in branches:
                names = _names(branch)
                assert _rows(index.match(names)) == truth.match(names)
        for branch in {tuple(tokens) for step in steps for tokens in _branches(step)}:
            names = _names(branch)
            assert _rows(index.match(names)) == truth.match(names)
        for slot in _HOLDERS:
            for tier in Tier:
                assert sorted(index.holdings(slot, tier)) == sorted(truth.held[slot][tier])
    _assert_nothing_is_left_when_all_are_cleared(index)


def _branches(step):
    if step[0] in ("store", "remove_run"):
        return [step[3]]
    if step[0] == "remove":
        return step[3]
    return [step[-1]] if step[0] in ("expect", "match", "retract") else []


def _assert_nothing_is_left_when_all_are_cleared(index):
    for slot in _HOLDERS:
        index.clear(slot)
    assert index.num_blocks == 0
    store = index._store
    assert (store.num_chains, store.num_cells, store.num_levels) == (0, 0, 0)
    assert not store._chains_of and not index._predictions._records
    assert not any(map(index.is_truncated, _HOLDERS))


@settings(max_examples=examples(40), deadline=None)
@given(steps=_steps)
def test_under_a_budget_the_index_never_claims_what_a_worker_lacks(steps):
    clock = FakeClock()
    truth, index = _Truth(clock), KVIndex(clock, ttl_s=_TTL_S)
    index._max_bytes = 9000
    index._predictions._max_bytes = index._max_bytes // 8
    branches = {tuple(tokens) for step in steps for tokens in _branches(step)}
    for step in steps:
        if step[0] == "wait":
            clock.advance(step[1])
        elif step[0] != "match":
            _run(step, truth)
            _run(step, index)
        assert index.num_bytes <= index._max_bytes
        for branch in branches:
            names = _names(branch)
            told = truth.match(names)
            for slot, row in _rows(index.match(names)).items():
                assert all(claimed <= true for claimed, true in zip(row[:4], told[slot], strict=False))
            assert index.num_bytes <= index._max_bytes
    is_complete = not any(map(index.is_truncated, _HOLDERS)) and not index.num_predictions_cut_short
    for branch in branches if is_complete else ():
        assert _rows(index.match(_names(branch))) == truth.match(_names(branch))
