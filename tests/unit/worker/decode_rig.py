"""A decode worker and the prefill worker whose KV it fetches."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from worker_rig import WorkerRig, open_worker, reserved

from kelp.core.types import BlockId, Role
from kelp.kv.handoff import Offer
from support.exchange import FakeExchange
from support.waiting import until


class Pair:
    """A decode worker and a prefill worker of which only the handoff side is used."""

    def __init__(self, decode: WorkerRig, prefill: WorkerRig) -> None:
        self.decode = decode
        self.prefill = prefill
        self.released: list[str] = []

    def offer(self, is_finished: bool = True) -> Offer:
        """The prompt's KV in the prefill worker's blocks 3 (33) and 5 (55); first token 7."""
        self.prefill.executor.pool[3], self.prefill.executor.pool[5] = 33, 55
        offer = self.prefill.handoffs.offer("h", lambda: self.released.append("h"))
        offer.announce(4, [BlockId(3)])
        if is_finished:
            offer.announce(8, [BlockId(5)])
            offer.finish(7, -0.5)
        return offer

    async def start(self, *blocks: int, **fields: object) -> tuple[FakeExchange, asyncio.Task[None]]:
        """A request whose prompt got `blocks`; none: still in the queue."""
        exchange, task = await self.decode.generate(Role.DECODE, self.prefill.rendezvous(), **fields)
        if blocks:
            self.decode.executor.emit(reserved(*blocks))
        return exchange, task

    def arrived(self, *blocks: int) -> list[int]:
        return [int(self.decode.executor.pool[block][0]) for block in blocks]

    async def asked(self, *names: str) -> None:
        """Wait until the executor was asked for `names`, then check that it was asked for nothing else."""
        await until(lambda: len(self.decode.executor.calls) >= len(names), f"{names}")
        assert sorted(self.decode.executor.names()) == sorted(names)


@contextlib.asynccontextmanager
async def open_pair(**handoff: float) -> AsyncIterator[Pair]:
    async with open_worker(Role.DECODE, **handoff) as decode, open_worker(Role.PREFILL) as prefill:
        yield Pair(decode, prefill)
