"""Which blocks one worker holds, in which tiers, and what changed since they were last told.

The publisher's own copy of the truth: it answers snapshots and digests without asking the engine, and turns the
engine's events, one per block, into few messages without effects that cancel out. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from kelp.core.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent
from kelp.core.types import SequenceHash, Tier
from kelp.kv.events.codec import TierDigest

_TIERS = tuple(Tier)
Parents = Mapping[SequenceHash, SequenceHash | None]
"""Blocks of one tier with the block before each."""


class StreamDigest:
    """Digest of a set of blocks per tier, from the changes alone: each must have an effect."""

    def __init__(self) -> None:
        self._num_blocks = [0] * len(Tier)
        self._exclusive_or = np.zeros((len(Tier), 2), dtype=np.uint64)

    def apply(self, events: Iterable[KVEvent]) -> None:
        """Follow changes that stored what was not there and removed what was."""
        changed: dict[Tier, list[bytes]] = {}
        for event in events:
            if isinstance(event, BlocksCleared):
                self._num_blocks = [0] * len(Tier)
                self._exclusive_or[:] = 0
                changed.clear()
                continue
            changed.setdefault(event.tier, []).extend(event.hashes)
            num_blocks = len(event.hashes)
            self._num_blocks[event.tier] += num_blocks if isinstance(event, BlocksStored) else -num_blocks
        for tier, hashes in changed.items():
            words = np.frombuffer(b"".join(hashes), dtype=np.uint64).reshape(-1, 2)
            self._exclusive_or[tier] ^= np.bitwise_xor.reduce(words, axis=0)

    def tiers(self) -> tuple[TierDigest, ...]:
        """The digest of each tier; a set that never was has a number below zero, and equals none."""
        return tuple(
            TierDigest(num_blocks, words.tobytes())
            for num_blocks, words in zip(self._num_blocks, self._exclusive_or, strict=True)
        )


class Residency:
    """What is held, and the net changes since `take_changes`."""

    def __init__(self) -> None:
        self._tiers: list[dict[SequenceHash, SequenceHash | None]] = [{} for _ in Tier]
        self._stored: list[dict[SequenceHash, SequenceHash | None]] = [{} for _ in Tier]
        self._removed: list[dict[SequenceHash, SequenceHash | None]] = [{} for _ in Tier]
        self._is_cleared = False
        self._digest = StreamDigest()

    @property
    def num_changes(self) -> int:
        """Blocks that `take_changes` would name."""
        return sum(map(len, self._stored)) + sum(map(len, self._removed))

    def apply(self, event: KVEvent) -> None:
        """Take one of the engine's events, whether or not it has an effect."""
        if isinstance(event, BlocksStored):
            self._store(event)
        elif isinstance(event, BlocksRemoved):
            self._remove(event)
        else:
            for blocks in (*self._tiers, *self._stored, *self._removed):
                blocks.clear()
            self._is_cleared = True

    def take_changes(self) -> list[KVEvent]:
        """What turns the state of the last call into today's; every event has an effect on each of its blocks.

        Within one batch only the end counts, so removals come first and runs of any interleaving are joined.
        """
        events: list[KVEvent] = [BlocksCleared()] if self._is_cleared else []
        for tier, removed in zip(_TIERS, self._removed, strict=True):
            if removed:
                events.append(BlocksRemoved(tuple(removed), tier))
                removed.clear()
        for tier, stored in zip(_TIERS, self._stored, strict=True):
            if stored:
                events += runs(stored, tier)
                stored.clear()
        self._is_cleared = False
        self._digest.apply(events)
        return events

    def digest(self) -> tuple[TierDigest, ...]:
        """Digest as of the last `take_changes`."""
        return self._digest.tiers()

    def copy(self) -> list[Parents]:
        """All blocks of each tier, untouched by later changes."""
        return [dict(blocks) for blocks in self._tiers]

    def _store(self, event: BlocksStored) -> None:
        held, stored, removed = self._tiers[event.tier], self._stored[event.tier], self._removed[event.tier]
        for sequence_hash, parent in zip(event.hashes, (event.parent, *event.hashes), strict=False):
            if sequence_hash not in held:
                held[sequence_hash] = parent
                if sequence_hash in removed:
                    del removed[sequence_hash]
                else:
                    stored[sequence_hash] = parent

    def _remove(self, event: BlocksRemoved) -> None:
        held, stored, removed = self._tiers[event.tier], self._stored[event.tier], self._removed[event.tier]
        for sequence_hash in event.hashes:
            if sequence_hash in held:
                del held[sequence_hash]
                if sequence_hash in stored:
                    del stored[sequence_hash]
                else:
                    removed[sequence_hash] = None


def runs(blocks: Parents, tier: Tier) -> list[KVEvent]:
    """Blocks as runs in which each is the parent of the next; parents should come before their children."""
    open_runs: dict[SequenceHash, list[SequenceHash]] = {}
    found: list[tuple[SequenceHash | None, list[SequenceHash]]] = []
    run: list[SequenceHash] = []
    tail: SequenceHash | None = None
    for sequence_hash, parent in blocks.items():
        if tail is None or parent != tail:
            # Only the run in hand goes on most of the time; the others wait under their last blocks.
            if tail is not None:
                open_runs[tail] = run
            goes_on = None if parent is None else open_runs.pop(parent, None)
            run = [] if goes_on is None else goes_on
            if goes_on is None:
                found.append((parent, run))
        run.append(sequence_hash)
        tail = sequence_hash
    return [BlocksStored(tuple(run), parent, tier) for parent, run in found]


def split(events: Sequence[KVEvent], max_blocks: int) -> Iterator[list[KVEvent]]:
    """The same events in batches of at most `max_blocks` blocks; long ones are cut."""
    if events and sum([_num_blocks(event) for event in events]) <= max_blocks:
        yield list(events)
        return
    batch: list[KVEvent] = []
    room = max_blocks
    for event in events:
        for piece in _pieces(event, max_blocks):
            num_blocks = _num_blocks(piece)
            if num_blocks > room:
                yield batch
                batch, room = [], max_blocks
            batch.append(piece)
            room -= num_blocks
    if batch:
        yield batch


def _num_blocks(event: KVEvent) -> int:
    return 0 if isinstance(event, BlocksCleared) else len(event.hashes)


def _pieces(event: KVEvent, max_blocks: int) -> Iterator[KVEvent]:
    if isinstance(event, BlocksCleared) or len(event.hashes) <= max_blocks:
        yield event
        return
    for start in range(0, len(event.hashes), max_blocks):
        hashes = event.hashes[start : start + max_blocks]
        if isinstance(event, BlocksRemoved):
            yield BlocksRemoved(hashes, event.tier)
        else:
            yield BlocksStored(hashes, event.hashes[start - 1] if start else event.parent, event.tier)
