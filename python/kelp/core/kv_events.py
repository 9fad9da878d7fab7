"""What happens to the blocks of one worker's KV, as the executor and the block manager tell it.

In-process values; how they travel is `kv.events`. Order matters, per worker: applying all events of an epoch in order
gives exactly the blocks that can be matched there.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from kelp.core.types import SequenceHash, Tier


class BlocksStored(msgspec.Struct, frozen=True, gc=False):
    """Consecutive blocks of one sequence can be matched in `tier` from now on.

    Attributes:
        hashes: Their names in sequence order, at least one.
        parent: The block before the first one; None at the start of a sequence. It need not be resident.
    """

    hashes: tuple[SequenceHash, ...]
    parent: SequenceHash | None
    tier: Tier = Tier.DEVICE


class BlocksRemoved(msgspec.Struct, frozen=True, gc=False):
    """These blocks can no longer be matched in `tier`; any order."""

    hashes: tuple[SequenceHash, ...]
    tier: Tier = Tier.DEVICE


class BlocksCleared(msgspec.Struct, frozen=True, gc=False):
    """Nothing can be matched any more, in any tier."""


KVEvent = BlocksStored | BlocksRemoved | BlocksCleared
KVEventSink = Callable[[KVEvent], None]
