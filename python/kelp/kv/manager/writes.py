"""What background writes into a lower tier have in common: a bounded queue, worked off one piece after the other.

Nothing waits for these writes. A block is held in the host tier only while its write READs it. What could have been
written and was not is missed: `catching_up` offers it again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from kelp.core.metrics import KV_TIER_REFUSED
from kelp.core.types import SequenceHash, Tier
from kelp.kv.manager.host import HostTier
from kelp.kv.manager.quarantine import LetGo, Quarantine
from kelp.kv.manager.threads import to_its_end


class TierWrites:
    """Into one lower tier; belongs to one event loop.

    Attributes:
        is_idle: Whether nothing is being written or waits for it.
        missed: Set when something was not written that may be offered again; whoever offers it clears this first.
    """

    def __init__(self, tier: Tier, host: HostTier, quarantine: Quarantine, max_queued: int) -> None:
        self.is_idle = True
        self.missed = asyncio.Event()
        self._host = host
        self._tier_name = tier.name.lower()
        self._quarantine = quarantine
        self._max_queued = max_queued
        self._queue: deque[SequenceHash] = deque()
        self._has_work = asyncio.Event()

    async def run(self) -> None:
        """Work for ever; cancel to stop."""
        while True:
            if not self._queue:
                self.is_idle = True
                self._has_work.clear()
                await self._has_work.wait()
            self.is_idle = False
            await to_its_end(self._write_some())

    async def let_go(self, slots: Sequence[int], is_clean: bool, how: LetGo) -> None:
        """Give back slots that a write has READ; after a failure, not before the tier has let go of them."""
        if not is_clean:
            await self._quarantine.end(slots, how)
            return
        for slot in slots:
            how(slot)

    async def _write_some(self) -> None:
        raise NotImplementedError

    @property
    def _is_full(self) -> bool:
        return len(self._queue) >= self._max_queued

    def _enqueue(self, name: SequenceHash) -> None:
        self._queue.append(name)
        self._has_work.set()
        self.is_idle = False

    def _refuse(self, reason: str, num_blocks: int = 1) -> None:
        self._host.stats.add(KV_TIER_REFUSED, num_blocks, tier=self._tier_name, reason=reason)

    def _miss(self, reason: str, num_blocks: int = 1) -> None:
        self._refuse(reason, num_blocks)
        self.missed.set()
