"""Stand-ins for the parts around KV events: an index that is a dict of sets, and a foreign engine's publisher."""

from __future__ import annotations

import struct
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

import msgspec

from kelp.core.hashing import child_hash, seed_hash
from kelp.core.kv_events import BlocksCleared, BlocksStored, KVEvent
from kelp.core.types import SequenceHash, Tier
from kelp.kv.events.codec import AllBlocksCleared, BlockRemoved, BlockStored, ForeignEvent
from kelp.kv.events.frames import END_SEQ, encode_seq

Held = frozenset[tuple[Tier, SequenceHash]]
END = [b"", encode_seq(END_SEQ), b""]


def digest16(number: int) -> SequenceHash:
    """A sequence hash that a test can tell."""
    return SequenceHash(struct.pack(">QQ", number, 0xE0E0))


class SetIndex:
    """What an `OverlapIndex` shall know, without what it is for."""

    def __init__(self) -> None:
        self.slots: defaultdict[int, set[tuple[Tier, SequenceHash]]] = defaultdict(set)
        self.error: Exception | None = None

    def apply(self, slot: int, event: KVEvent) -> None:
        if self.error is not None:
            raise self.error
        if isinstance(event, BlocksCleared):
            self.slots[slot].clear()
        elif isinstance(event, BlocksStored):
            self.slots[slot].update((event.tier, block) for block in event.hashes)
        else:
            self.slots[slot].difference_update((event.tier, block) for block in event.hashes)

    def clear(self, slot: int) -> None:
        self.slots.pop(slot, None)

    def held(self, slot: int = 0) -> Held:
        return frozenset(self.slots.get(slot, ()))


class ForeignEngine:
    """vLLM as its events show it: opaque hashes, a ring of past batches, no epochs, no snapshots."""

    def __init__(self, start_ts: float, ring: int) -> None:
        self.ts = start_ts
        self.seq = 0
        self.held: dict[int, SequenceHash] = {}
        self._ring: deque[list[bytes]] = deque(maxlen=ring)

    def store(self, block: int, parent: int | None) -> list[bytes]:
        before = seed_hash("m") if parent is None else self.held[parent]
        self.held[block] = child_hash(before, [block])
        return self._batch([BlockStored([block], parent, [block], 1, medium="GPU")])

    def remove(self, block: int) -> list[bytes]:
        del self.held[block]
        return self._batch([BlockRemoved([block], "GPU")])

    def clear(self) -> list[bytes]:
        self.held.clear()
        return self._batch([AllBlocksCleared()])

    def replay(self, start_seq: int) -> Iterator[list[bytes]]:
        yield from (frames for frames in self._ring if int.from_bytes(frames[1], "big") >= start_seq)
        yield END

    def truth(self) -> Held:
        return frozenset((Tier.DEVICE, block) for block in self.held.values())

    def _batch(self, events: Sequence[ForeignEvent]) -> list[bytes]:
        self.ts += 1.0
        frames = [b"", encode_seq(self.seq), msgspec.msgpack.encode([self.ts, list(events), 0])]
        self.seq += 1
        self._ring.append(frames)
        return frames
