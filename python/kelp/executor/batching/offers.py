"""Which sealed blocks lower tiers have yet to be told of, and which of them are kept still for that.

Whoever watches takes what it has room for; the rest waits here for as long as the prefix cache has it, so that a burst,
or a watcher that was away, loses nothing but what is evicted meanwhile. What has been taken is evicted last, and of
that the first eighth of the pool only when a running sequence has to grow, so that some always arrives below. Belongs
to the engine's thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Many
from itertools import groupby, islice

from kelp.core.kv_events import BlocksRemoved, KVEvent
from kelp.core.types import BlockId, SequenceHash
from kelp.executor.base import EvictionWatch, SealedBlock, SealWatch
from kelp.executor.batching.schedulable import Sealable
from kelp.executor.batching.sequence import Sequence
from kelp.kv.pool import BlockPool

_FIRM_SHARE = 8
_MAX_TOLD_AT_ONCE = 64
_MAX_WINDOW_BLOCKS = 1024
"""How far ahead of eviction write-back looks: it does so after every step that took a block."""


class SealOffers:
    """See the module docstring; does nothing before `watch`."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._watch: SealWatch | None = None
        self._watermark: float | None = None
        self._on_evicted: EvictionWatch | None = None
        self._firm: set[BlockId] = set()
        self._untold: dict[SequenceHash, SealedBlock] = {}
        self._has_news = False

    def watch(self, watch: SealWatch, watermark: float | None, on_evicted: EvictionWatch | None = None) -> None:
        """See `TieredExecutor.watch_seals`."""
        self._watch = watch
        self._watermark = watermark
        self._on_evicted = on_evicted
        self._pool.watch(self._note)

    def sealed(self, sequence: Sequence, run: Sealable) -> None:
        """Blocks of a sequence became final; those whose content another block holds already are of no interest."""
        if self._watch is None:
            return
        parent, tenant = run.parent, sequence.request.tenant
        for position, (block_id, name) in enumerate(zip(run.block_ids, run.hashes, strict=True), run.position):
            if self._pool.block_of(name) == block_id:
                self._untold[name] = SealedBlock(block_id, name, parent, position, tenant)
            parent = name
        self._has_news = True

    def tell(self) -> None:
        """Offer what is due, as far as the watch takes it; to be called after every step."""
        if self._watch is None or not self._has_news:
            return
        self._has_news = False
        for _, group in groupby(self._due(), key=lambda block: block.tenant):
            blocks = list(group)
            num_kept = self._watch(blocks)
            self._keep(blocks[:num_kept])
            if num_kept < len(blocks):
                return

    def release(self, block_ids: Many[BlockId]) -> None:
        """See `TieredExecutor.release_kept`; there is room again."""
        self._pool.unpin(filter(self._pool.is_pinned, block_ids))
        self._firm.difference_update(block_ids)
        self._has_news = True

    def yield_kept(self) -> bool:
        """A running sequence finds no block: kept ones may be evicted, too. Returns whether that helps."""
        if self._on_evicted is None or not self._firm:
            return False
        self._firm.clear()
        self._pool.loosen_pins()
        return self._pool.num_available > 0

    def _due(self) -> list[SealedBlock]:
        if self._watermark is None:
            return list(islice(self._untold.values(), _MAX_TOLD_AT_ONCE))
        num_wanted = math.ceil(self._watermark * self._pool.num_blocks) - self._pool.num_free
        names = self._pool.next_evicted(min(max(0, num_wanted), _MAX_WINDOW_BLOCKS))
        return [block for name in names if (block := self._untold.get(name)) is not None]

    def _keep(self, blocks: Iterable[SealedBlock]) -> None:
        limit = self._pool.num_blocks if self._on_evicted is None else max(1, self._pool.num_blocks // _FIRM_SHARE)
        for block in blocks:
            is_firm = len(self._firm) < limit
            if is_firm:
                self._firm.add(block.block_id)
            self._pool.pin((block.block_id,), is_firm)
            del self._untold[block.sequence_hash]

    def _note(self, event: KVEvent) -> None:
        if isinstance(event, BlocksRemoved):
            for name in event.hashes:
                self._untold.pop(name, None)
            self._has_news = True
            if self._on_evicted is not None:
                self._on_evicted(event.hashes)
