"""Blocks of one prompt on their way from the manager's slots into the worker's reserved blocks.

Each chunk is READ, held against the lease and checked by itself while lower tiers still load what comes next; what
counts is the run of right blocks from the first on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from kelp.core.errors import FatalTransferError, KelpError, ProtocolError
from kelp.core.kv_manager_messages import Leased
from kelp.core.kv_manager_values import SlotRef
from kelp.core.types import BlockId, SequenceHash
from kelp.worker.tiers.leases import Lease
from kelp.worker.tiers.slot_reads import SlotReads

CountRight = Callable[[Sequence[SequenceHash], Sequence[SlotRef], Sequence[BlockId]], Coroutine[Any, Any, int]]


@dataclass(frozen=True, slots=True)
class Goods:
    """What shall be brought.

    Attributes:
        names: Of the blocks that the lease is about, in order.
        block_ids: Where each shall lie.
        num_present: The first of them that lie there already.
    """

    names: Sequence[SequenceHash]
    block_ids: Sequence[BlockId]
    num_present: int


class Bringing:
    """See the module docstring; `run` may be cancelled, `stop` comes after it.

    Attributes:
        num_right: Leading blocks that are in place, those that were before included.
        corrupt: Names of blocks whose bytes were wrong.

    Args:
        ask: Says how the lease stands; gets the number of blocks known to be ready.
        count_right: Looks at what has been READ.
    """

    def __init__(
        self,
        goods: Goods,
        lease: Lease,
        reads: SlotReads,
        ask: Callable[[int], Coroutine[Any, Any, Leased]],
        count_right: CountRight,
        step: int,
    ) -> None:
        self._goods = goods
        self._lease = lease
        self._reads = reads
        self._ask = ask
        self._count_right = count_right
        self._step = step
        self._done: dict[int, int] = {}
        self.corrupt: list[SequenceHash] = []

    @property
    def num_right(self) -> int:
        """See the class."""
        end = self._goods.num_present
        while (num_right := self._done.get(end, 0)) > 0:
            end += num_right
        return end

    async def run(self, leased: Leased) -> None:
        """Bring what the lease gives, as it becomes ready.

        Raises:
            KelpError: Not all of it came; `num_right` says how much did.
        """
        chunks: list[asyncio.Future[None]] = []
        try:
            num_taken = 0
            ready = list(leased.ready)
            while True:
                num_ready = min(len(ready), len(self._goods.block_ids))
                for begin in range(max(num_taken, self._goods.num_present), num_ready, self._step):
                    end = min(begin + self._step, num_ready)
                    chunks.append(asyncio.ensure_future(self._bring(begin, ready[begin:end])))
                num_taken = num_ready
                if num_taken >= min(leased.num_blocks, len(self._goods.block_ids)):
                    break
                leased = await self._ask(num_taken)
                ready += leased.ready
            await asyncio.gather(*chunks)
        finally:
            for chunk in chunks:
                chunk.cancel()
            await asyncio.gather(*chunks, return_exceptions=True)

    async def stop(self) -> None:
        """Returns when nothing writes into the blocks any more."""
        await self._reads.stop()

    async def _bring(self, begin: int, references: Sequence[SlotRef]) -> None:
        loop, traffic = asyncio.get_running_loop(), self._lease.traffic
        traffic.begin(loop.time())
        try:
            await self._read_and_check(begin, references)
        finally:
            traffic.end(loop.time(), self._done.get(begin, 0))

    async def _read_and_check(self, begin: int, references: Sequence[SlotRef]) -> None:
        end = begin + len(references)
        block_ids = self._goods.block_ids[begin:end]
        ended_s = await self._reads.read([reference.slot for reference in references], block_ids)
        if not self._lease.covers(ended_s):
            raise FatalTransferError("onboarding: the lease ran out before the READ was complete")
        names = self._goods.names[begin:end]
        num_right = await self._count_right(names, references, block_ids)
        self._done[begin] = num_right
        if num_right < len(references):
            self.corrupt.append(names[num_right])
            raise ProtocolError(f"onboarding: block {names[num_right].hex()} came with wrong bytes")


def outcome_of(bringing: asyncio.Future[None]) -> KelpError | None:
    """Why a bringing has not brought everything; None if it has, or was given up.

    Raises:
        Exception: What must not happen.
    """
    if not bringing.done() or bringing.cancelled():
        return None
    error = bringing.exception()
    if error is not None and not isinstance(error, KelpError):
        raise error
    return error
