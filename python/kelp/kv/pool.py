"""Who holds which KV block of one worker, and which blocks already contain a known prefix.

A block is in exactly one state:

    FREE    nobody holds it, its content means nothing
    HELD    at least one reference; sealed (its hash is known) or not
    CACHED  sealed, no reference: may be matched again, or evicted

`allocate` and `match` take references, `release` returns them; a reference outlives its request for as long as
a transfer may touch the block (lease, quarantine), so this module needs no notion of either. Blocks released
together are evicted tail first: a prefix is worth more than what follows it.

Bookkeeping only: knows nothing of tensors, engines or transports. Not thread-safe: one thread owns a pool.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kelp.core.errors import CapacityError, InternalError
from kelp.core.kv_events import BlocksRemoved, BlocksStored, KVEventSink
from kelp.core.types import BlockId, SequenceHash


class BlockState(enum.Enum):
    """See the module docstring."""

    FREE = "free"
    HELD = "held"
    CACHED = "cached"


@dataclass(slots=True)
class _Block:
    state: BlockState = BlockState.FREE
    num_references: int = 0
    sequence_hash: SequenceHash | None = None


class BlockPool:
    """Reference counts and the prefix cache over `num_blocks` equal blocks."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: deque[BlockId] = deque(BlockId(index) for index in range(num_blocks))
        self._cached: OrderedDict[BlockId, None] = OrderedDict()
        self._by_hash: dict[SequenceHash, BlockId] = {}
        self._sink: KVEventSink = lambda _: None

    def watch(self, sink: KVEventSink) -> None:
        """Report every block that can be matched from now on, or no longer, as it happens."""
        self._sink = sink

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self._blocks)

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
        return self.num_free + self.num_cached

    def state(self, block_id: BlockId) -> BlockState:
        """State of one block."""
        return self._block(block_id).state

    def num_references(self, block_id: BlockId) -> int:
        """References on one block."""
        return self._block(block_id).num_references

    def allocate(self, count: int) -> list[BlockId]:
        """Take `count` blocks with one reference each, evicting cached ones only when no free one is left.

        Raises:
            CapacityError: Fewer are available; nothing was taken.
        """
        if count > self.num_available:
            raise CapacityError(f"{count} KV blocks asked for, {self.num_available} available")
        evicted: list[SequenceHash] = []
        taken = [self._take(evicted) for _ in range(count)]
        if evicted:
            self._sink(BlocksRemoved(tuple(evicted)))
        return taken

    def reference(self, block_ids: Iterable[BlockId]) -> None:
        """Add one reference to each of some held blocks.

        Raises:
            InternalError: A block is not held.
        """
        for block_id in block_ids:
            self._held(block_id, "reference").num_references += 1

    def release(self, block_ids: Sequence[BlockId]) -> None:
        """Give one reference of each back; `block_ids` are in sequence order, so the tail is evicted first.

        Raises:
            InternalError: A block is not held (double free).
        """
        for block_id in reversed(block_ids):
            block = self._held(block_id, "release")
            block.num_references -= 1
            if block.num_references:
                continue
            if block.sequence_hash is None:
                block.state = BlockState.FREE
                self._free.append(block_id)
            else:
                block.state = BlockState.CACHED
                self._cached[block_id] = None

    def seal(self, block_id: BlockId, sequence_hash: SequenceHash, parent: SequenceHash | None = None) -> bool:
        """Declare the content of a held, full block final; `parent` names the block before it, None the first's.

        Of several blocks with one hash the first stays the canonical one; the others stay anonymous and become
        free, not cached, at their release.

        Returns:
            Whether the block can now be matched.

        Raises:
            InternalError: The block is not held, or already sealed under another hash.
        """
        block = self._held(block_id, "seal")
        if block.sequence_hash not in (None, sequence_hash):
            raise InternalError(f"block {block_id} is already sealed under another hash")
        if self._by_hash.setdefault(sequence_hash, block_id) != block_id:
            return False
        if block.sequence_hash is None:
            block.sequence_hash = sequence_hash
            self._sink(BlocksStored((sequence_hash,), parent))
        return True

    def match(self, hashes: Sequence[SequenceHash]) -> list[BlockId]:
        """Take a reference on each block of the longest known prefix of `hashes`; they may be fewer, or none."""
        found: list[BlockId] = []
        for sequence_hash in hashes:
            block_id = self._by_hash.get(sequence_hash)
            if block_id is None:
                break
            block = self._blocks[block_id]
            if block.state is BlockState.CACHED:
                del self._cached[block_id]
                block.state = BlockState.HELD
            block.num_references += 1
            found.append(block_id)
        return found

    def check_integrity(self) -> None:
        """Verify every invariant; for tests, and cheap enough for an idle engine.

        Raises:
            InternalError: Bookkeeping is broken; names the first thing found.
        """
        free = set(self._free)
        _require(len(free) == len(self._free), "a block is in the free list twice")
        hashes: dict[SequenceHash, BlockId] = {}
        for index, block in enumerate(self._blocks):
            block_id = BlockId(index)
            _require((block_id in free) == (block.state is BlockState.FREE), f"block {index}: free list")
            cached = block_id in self._cached
            _require(cached == (block.state is BlockState.CACHED), f"block {index}: cache list")
            is_held = block.state is BlockState.HELD
            _require((block.num_references > 0) == is_held, f"block {index}: references")
            if block.state is not BlockState.HELD:
                _require((block.sequence_hash is not None) == cached, f"block {index}: seal")
            if block.sequence_hash is not None:
                hashes[block.sequence_hash] = block_id
        _require(hashes == self._by_hash, "the hash index differs from the sealed blocks")

    def _take(self, evicted: list[SequenceHash]) -> BlockId:
        block_id = self._free.popleft() if self._free else self._evict(evicted)
        block = self._blocks[block_id]
        block.state = BlockState.HELD
        block.num_references = 1
        return block_id

    def _evict(self, evicted: list[SequenceHash]) -> BlockId:
        block_id, _ = self._cached.popitem(last=False)
        block = self._blocks[block_id]
        assert block.sequence_hash is not None
        del self._by_hash[block.sequence_hash]
        evicted.append(block.sequence_hash)
        block.sequence_hash = None
        return block_id

    def _block(self, block_id: BlockId) -> _Block:
        if not 0 <= block_id < len(self._blocks):
            raise InternalError(f"block {block_id} is outside the pool of {len(self._blocks)}")
        return self._blocks[block_id]

    def _held(self, block_id: BlockId, action: str) -> _Block:
        block = self._blocks[block_id] if 0 <= block_id < len(self._blocks) else self._block(block_id)
        if block.state is not BlockState.HELD:
            raise InternalError(f"{action} of block {block_id}, which is {block.state.value}")
        return block


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise InternalError(f"KV pool integrity: {what}")
