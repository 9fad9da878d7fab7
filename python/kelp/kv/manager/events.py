"""The tiers' contents as KV events, for routers that count host, disk and object hits."""

from __future__ import annotations

from collections.abc import Sequence

from kelp.core.kv_events import BlocksRemoved, BlocksStored, KVEventSink
from kelp.core.types import SequenceHash, Tier
from kelp.kv.tiers.base import BlockRecord


class TierEvents:
    """Events of one tier."""

    def __init__(self, tier: Tier, sink: KVEventSink) -> None:
        self._tier = tier
        self._sink = sink

    def arrived(self, records: Sequence[BlockRecord]) -> None:
        """Blocks can be matched from now on; those that follow each other are told as one run."""
        run: list[BlockRecord] = []
        for record in records:
            if run and record.parent != run[-1].sequence_hash:
                self._tell(run)
                run = []
            run.append(record)
        if run:
            self._tell(run)

    def left(self, names: Sequence[SequenceHash]) -> None:
        """Blocks can no longer be matched."""
        if names:
            self._sink(BlocksRemoved(tuple(names), self._tier))

    def _tell(self, run: Sequence[BlockRecord]) -> None:
        self._sink(BlocksStored(tuple(record.sequence_hash for record in run), run[0].parent, self._tier))
