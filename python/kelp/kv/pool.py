"""Who holds which KV block of one worker, and which blocks already contain a known prefix.

A block is in exactly one state:

    FREE    nobody holds it, its content means nothing
    HELD    at least one reference; sealed (its hash is known) or not
    CACHED  sealed, no reference: may be matched again, or evicted unless it is pinned

`allocate` and `match` take references, `release` returns them; a reference outlives its request for as long as
a transfer may touch the block (lease, quarantine), so this module needs no notion of either. Blocks released
together are evicted tail first: a prefix is worth more than what follows it. Pins are for who reads a sealed block
without being its user (`kv.cached`).

Bookkeeping only: knows nothing of tensors, engines or transports. Not thread-safe: one thread owns a pool.
"""

from __future__ import annotations

import enum
import itertools
from collections import deque
from collections.abc import Iterable, Sequence

from kelp.core.errors import CapacityError, InternalError
from kelp.core.kv_events import BlocksRemoved, BlocksStored, KVEventSink
from kelp.core.types import BlockId, SequenceHash
from kelp.kv.cached import CachedBlocks


class BlockState(enum.Enum):
    """See the module docstring."""

    FREE = "free"
    HELD = "held"
    CACHED = "cached"


class BlockPool:
    """Reference counts and the prefix cache over `num_blocks` equal blocks."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        # Columns, because a request goes through a hundred blocks. The state of a block follows from its entries.
        self._num_references = [0] * num_blocks
        self._hashes: list[SequenceHash | None] = [None] * num_blocks
        self._free: deque[BlockId] = deque(BlockId(index) for index in range(num_blocks))
        self._cached = CachedBlocks()
        self._by_hash: dict[SequenceHash, BlockId] = {}
        self._sinks: list[KVEventSink] = []

    def watch(self, sink: KVEventSink) -> None:
        """Report every block that can be matched from now on, or no longer, as it happens, to this sink as well."""
        self._sinks.append(sink)

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self._num_references)

    @property
    def num_free(self) -> int:
        """Blocks without content."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Sealed blocks that nobody holds."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free) + self._cached.num_available

    @property
    def num_pinned(self) -> int:
        """Pinned blocks, whoever holds them."""
        return self._cached.num_pins

    def state(self, block_id: BlockId) -> BlockState:
        """State of one block."""
        if self._num_references[self._checked(block_id)]:
            return BlockState.HELD
        return BlockState.FREE if self._hashes[block_id] is None else BlockState.CACHED

    def num_references(self, block_id: BlockId) -> int:
        """References on one block."""
        return self._num_references[self._checked(block_id)]

    def allocate(self, count: int) -> list[BlockId]:
        """Take `count` blocks with one reference each, evicting cached ones only when no free one is left.

        Raises:
            CapacityError: Fewer are available; nothing was taken.
        """
        if count > self.num_available:
            raise CapacityError(f"{count} KV blocks asked for, {self.num_available} available")
        num_free = min(count, len(self._free))
        taken = [self._free.popleft() for _ in range(num_free)]
        if num_free < count:
            taken += self._evict(count - num_free)
        for block_id in taken:
            self._num_references[block_id] = 1
        return taken

    def reference(self, block_ids: Iterable[BlockId]) -> None:
        """Add one reference to each of some held blocks.

        Raises:
            InternalError: A block is not held.
        """
        for block_id in block_ids:
            self._check_held((block_id,), "reference")
            self._num_references[block_id] += 1

    def release(self, block_ids: Sequence[BlockId]) -> None:
        """Give one reference of each back; `block_ids` are in sequence order, so the tail is evicted first.

        Raises:
            InternalError: A block is not held (double free).
        """
        self._check_held(block_ids, "release")
        for block_id in reversed(block_ids):
            num_left = self._num_references[block_id] - 1
            if num_left < 0:
                raise InternalError(f"release of block {block_id} more often than it is held")
            self._num_references[block_id] = num_left
            if num_left:
                continue
            if self._hashes[block_id] is None:
                self._free.append(block_id)
            else:
                self._cached.add(block_id)

    def seal(self, block_id: BlockId, sequence_hash: SequenceHash, parent: SequenceHash | None = None) -> bool:
        """`seal_run` of one block; returns whether the block can now be matched."""
        self.seal_run((block_id,), (sequence_hash,), parent)
        return self._by_hash[sequence_hash] == block_id

    def seal_run(
        self, block_ids: Sequence[BlockId], hashes: Sequence[SequenceHash], parent: SequenceHash | None = None
    ) -> None:
        """Declare the content of held, full blocks final, which follow each other in one sequence.

        Of several blocks with one hash the first stays the canonical one; the others stay anonymous and become
        free, not cached, at their release.

        Args:
            block_ids: The blocks.
            hashes: Their names.
            parent: Names the block before the first one; None at the start of a sequence.

        Raises:
            InternalError: A block is not held, and nothing was sealed; or one is already sealed under another hash,
                and those before it were sealed.
        """
        self._check_held(block_ids, "seal")
        stored: list[SequenceHash] = []
        try:
            for block_id, sequence_hash in zip(block_ids, hashes, strict=True):
                known = self._hashes[block_id]
                if known is not None and known != sequence_hash:
                    raise InternalError(f"block {block_id} is already sealed under another hash")
                if self._by_hash.setdefault(sequence_hash, block_id) == block_id and known is None:
                    self._hashes[block_id] = sequence_hash
                    stored.append(sequence_hash)
                else:
                    self._tell_stored(stored, parent)
                    stored, parent = [], sequence_hash
        finally:
            self._tell_stored(stored, parent)

    def match(self, hashes: Sequence[SequenceHash]) -> list[BlockId]:
        """Take a reference on each block of the longest known prefix of `hashes`; they may be fewer, or none."""
        found: list[BlockId] = []
        for sequence_hash in hashes:
            block_id = self._by_hash.get(sequence_hash)
            if block_id is None:
                break
            if not self._num_references[block_id]:
                self._cached.remove(block_id)
            self._num_references[block_id] += 1
            found.append(block_id)
        return found

    def count_known(self, hashes: Iterable[SequenceHash]) -> int:
        """How many leading ones of `hashes` could be matched right now; a hint that any thread may ask for."""
        return sum(1 for _ in itertools.takewhile(self._by_hash.__contains__, hashes))

    def block_of(self, sequence_hash: SequenceHash) -> BlockId | None:
        """The block that can be matched under a name."""
        return self._by_hash.get(sequence_hash)

    def next_evicted(self, count: int) -> list[SequenceHash]:
        """Names of the cached blocks that would be evicted first, `count` at most, pins left aside."""
        hashes = [self._hashes[block_id] for block_id in itertools.islice(self._cached, count)]
        return [sequence_hash for sequence_hash in hashes if sequence_hash is not None]

    def is_pinned(self, block_id: BlockId) -> bool:
        """Whether the block has a pin."""
        return self._cached.is_pinned(block_id)

    def pin(self, block_ids: Iterable[BlockId], is_firm: bool = True) -> None:
        """Keep sealed blocks from being evicted until `unpin`; if not firmly, only while there are others to evict.

        Raises:
            InternalError: A block is pinned already, or not sealed.
        """
        for block_id in block_ids:
            if self._hashes[self._checked(block_id)] is None or self._cached.is_pinned(block_id):
                raise InternalError(f"pin of block {block_id}, which is pinned already or not sealed")
            self._cached.pin(block_id, is_firm)

    def unpin(self, block_ids: Iterable[BlockId]) -> None:
        """Let blocks be evicted again.

        Raises:
            InternalError: A block is not pinned.
        """
        for block_id in block_ids:
            if not self._cached.is_pinned(block_id):
                raise InternalError(f"unpin of block {block_id}, which is not pinned")
            self._cached.unpin(block_id)

    def loosen_pins(self) -> None:
        """No pin is firm from now on."""
        self._cached.loosen()

    def check_integrity(self) -> None:
        """Verify every invariant; for tests, and cheap enough for an idle engine.

        Raises:
            InternalError: Bookkeeping is broken; names the first thing found.
        """
        free = set(self._free)
        _require(len(free) == len(self._free), "a block is in the free list twice")
        hashes: dict[SequenceHash, BlockId] = {}
        for index, (num_references, sequence_hash) in enumerate(zip(self._num_references, self._hashes, strict=True)):
            block_id = BlockId(index)
            _require(num_references >= 0, f"block {index}: references")
            state = self.state(block_id)
            _require((block_id in free) == (state is BlockState.FREE), f"block {index}: free list")
            _require((block_id in self._cached) == (state is BlockState.CACHED), f"block {index}: cache list")
            if sequence_hash is not None:
                hashes[sequence_hash] = block_id
        _require(hashes == self._by_hash, "the hash index differs from the sealed blocks")
        _require(self._cached.pinned <= set(hashes.values()), "a pinned block has no name")
        _require(self._cached.is_sound(), "pinned cached blocks")

    def _tell_stored(self, hashes: list[SequenceHash], parent: SequenceHash | None) -> None:
        if hashes:
            self._tell(BlocksStored(tuple(hashes), parent))

    def _tell(self, event: BlocksStored | BlocksRemoved) -> None:
        for sink in self._sinks:
            sink(event)

    def _evict(self, count: int) -> list[BlockId]:
        block_ids = self._cached.take(count)
        evicted: list[SequenceHash] = []
        for block_id in block_ids:
            sequence_hash = self._hashes[block_id]
            assert sequence_hash is not None
            del self._by_hash[sequence_hash]
            self._hashes[block_id] = None
            evicted.append(sequence_hash)
        self._tell(BlocksRemoved(tuple(evicted)))
        return block_ids

    def _checked(self, block_id: BlockId) -> BlockId:
        if not 0 <= block_id < len(self._num_references):
            raise InternalError(f"block {block_id} is outside the pool of {len(self._num_references)}")
        return block_id

    def _check_held(self, block_ids: Sequence[BlockId], action: str) -> None:
        is_inside = not block_ids or (min(block_ids) >= 0 and max(block_ids) < len(self._num_references))
        if is_inside and all(map(self._num_references.__getitem__, block_ids)):
            return
        for block_id in block_ids:
            if self.state(block_id) is not BlockState.HELD:
                raise InternalError(f"{action} of block {block_id}, which is {self.state(block_id).value}")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise InternalError(f"KV pool integrity: {what}")
