"""The contract between whoever knows where blocks are and whoever decides by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kelp.core.kv_events import KVEvent
from kelp.core.types import SequenceHash


class Matches(NamedTuple):
    """Workers that have at least the first block of a prompt in some tier, or are expected to.

    Attributes:
        slots: `[num_workers] intp`, `router.decision.workers` slots, no order promised.
        blocks: `[num_workers, num_tiers] int32`: leading blocks of the prompt that lie in this tier or a faster one,
            so rows never decrease; a block that is missing in all tiers ends the count. Lower tiers are the worker's
            own and those of its KV block manager: each block may lie in either.
        predicted: `[num_workers] int32`: leading blocks counted on the strength of a prediction alone; at most
            `blocks[:, 0]`, which includes them.
    """

    slots: npt.NDArray[np.intp]
    blocks: npt.NDArray[np.int32]
    predicted: npt.NDArray[np.int32]


class OverlapIndex(Protocol):
    """Belongs to one event loop; no call blocks."""

    def apply(self, slot: int, event: KVEvent) -> None:
        """Take one worker's event; events of one worker come in order."""

    def clear(self, slot: int) -> None:
        """Forget everything about a worker: it left, or starts over."""

    def expect(self, slot: int, hashes: Sequence[SequenceHash]) -> None:
        """A request with this prompt was just sent there: count its blocks until events or time tell otherwise."""

    def retract(self, slot: int, hashes: Sequence[SequenceHash]) -> None:
        """The request failed before its prompt was computed: what `expect` said about these no longer holds."""

    def match(self, hashes: Sequence[SequenceHash]) -> Matches:
        """Leading blocks that each worker has of a prompt."""

    @property
    def num_bytes(self) -> int:
        """Estimated memory, never above the budget it was made with."""
