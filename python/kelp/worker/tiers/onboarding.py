"""One request whose leading blocks can come from lower tiers, from the manager's answer to the end of its lease.

    asked ──► submitted ──Reserved──► bringing ──► complete_onboard ──► lease released
                 │ first other event                  ▲
                 └────────► lease released            └ or, the request being over: end_import

It runs in a task of its own, so nothing that happens to the request leaves a READ, a reserved block or a lease behind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kelp.core.clock import Clock
from kelp.core.errors import KelpError
from kelp.core.kv_manager_messages import Leased
from kelp.core.types import SequenceHash, Tier
from kelp.executor.base import Admitted, ExecutorEvent, ExecutorRequest, Reserved, TieredExecutor
from kelp.worker.tiers.bringing import Bringing, Goods, outcome_of
from kelp.worker.tiers.leases import Lease

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    """What the manager has promised for a prompt.

    Attributes:
        names: Of the prompt's leading blocks, those that the cache had when it was asked included.
        first: Index of the first that the lease is about.
        give_up_s: Seconds after which what has not come is computed.
    """

    lease: Lease
    leased: Leased
    names: Sequence[SequenceHash]
    first: int
    give_up_s: float


class Desk(Protocol):
    """Who does the work for all onboardings."""

    @property
    def executor(self) -> TieredExecutor:
        """The engine."""

    @property
    def clock(self) -> Clock:
        """Times onboardings."""

    def bring(self, offer: Offer, goods: Goods) -> Bringing:
        """READs of one offer, not begun."""

    def end(self, offer: Offer, corrupt: Sequence[SequenceHash]) -> None:
        """Release the lease, in the background."""

    def count(self, num_blocks: int, outcome: str) -> None:
        """For the metrics."""


class Account(Protocol):
    """Where it is written what a request cost, before its first token can come."""

    def note_usage(self, **counts: int | tuple[int, ...]) -> None:
        """Fields of `RequestUsage`."""

    def note_time(self, **times_ns: int) -> None:
        """Fields of `RequestTimings`."""


class Onboarding:
    """See the module docstring; made on the event loop that it belongs to.

    Attributes:
        request: To be submitted in place of the original one.
        task: Ends when nothing is held any more.
    """

    def __init__(self, desk: Desk, request: ExecutorRequest, offer: Offer, account: Account) -> None:
        self._desk = desk
        self._offer = offer
        self._account = account
        self._pass_on = request.sink
        self._is_decided = False
        self._is_over = False
        self._is_answered = False
        self._bringing: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._reserved: asyncio.Future[Reserved | None] = self._loop.create_future()
        num_blocks = offer.first + offer.leased.num_blocks
        self.request = replace(request, onboard_blocks=num_blocks, sink=self._sink)
        self.task = asyncio.ensure_future(self._run())

    def close(self) -> None:
        """The request is over, or was never submitted."""
        if self._is_over:
            return
        self._is_over = True
        if self._bringing is not None:
            self._bringing.cancel()
        elif not self._reserved.done():
            # The executor may have reserved blocks already: the end can be faster than its event.
            self._give_back()
            self._reserved.set_result(None)

    def _sink(self, event: ExecutorEvent) -> None:
        """Called from the executor's thread."""
        if isinstance(event, Reserved):
            self._is_decided = True
            self._loop.call_soon_threadsafe(self._settle, event)
            return
        if not self._is_decided and not isinstance(event, Admitted):
            self._is_decided = True
            self._loop.call_soon_threadsafe(self._settle, None)
        self._pass_on(event)

    def _settle(self, reserved: Reserved | None) -> None:
        if not self._reserved.done():
            self._reserved.set_result(reserved)

    async def _run(self) -> None:
        corrupt: Sequence[SequenceHash] = ()
        try:
            reserved = await self._reserved
            if reserved is None:
                self._desk.count(self._offer.leased.num_blocks, "unneeded")
            elif self._is_over:
                self._give_back()
            else:
                corrupt = await self._fill(reserved)
        except Exception:
            _log.exception("onboarding of %s failed", self.request.request_id)
            if not self._is_answered:
                self._answer(0)
        finally:
            self._desk.end(self._offer, corrupt)

    async def _fill(self, reserved: Reserved) -> Sequence[SequenceHash]:
        offer, num_cached = self._offer, reserved.num_cached_blocks
        self._account.note_time(onboard_start_ns=self._desk.clock.wall_ns())
        num_present = num_cached - offer.first
        if num_present < 0:
            # Blocks that the cache had when it was asked are gone, and the lease begins behind them.
            self._complete(num_cached, num_cached)
            return ()
        goods = Goods(offer.names[offer.first :], reserved.block_ids[offer.first :], num_present)
        bringing = self._desk.bring(offer, goods)
        self._bringing = asyncio.ensure_future(bringing.run(offer.leased))
        try:
            await asyncio.wait({self._bringing}, timeout=offer.give_up_s)
            self._log_outcome(outcome_of(self._bringing))
        finally:
            self._bringing.cancel()
            await asyncio.wait({self._bringing})
            await bringing.stop()
            if self._is_over:
                self._give_back()
            else:
                self._complete(offer.first + bringing.num_right, num_cached)
        return bringing.corrupt

    def _log_outcome(self, error: KelpError | None) -> None:
        if error is not None:
            _log.warning("onboarding of %s is cut short: %s", self.request.request_id, error)

    def _complete(self, num_blocks: int, num_cached: int) -> None:
        num_brought = num_blocks - num_cached
        self._desk.count(num_brought, "onboarded")
        self._desk.count(len(self._offer.names) - num_blocks, "missed")
        size = self._desk.executor.layout.block_size
        begin = num_cached - self._offer.first
        by_tier = _by_tier(self._offer.leased, begin, begin + num_brought)
        self._account.note_time(onboard_done_ns=self._desk.clock.wall_ns())
        self._account.note_usage(cached_tokens=num_blocks * size, onboarded_blocks=num_brought, onboarded_tiers=by_tier)
        self._answer(num_blocks)

    def _answer(self, num_blocks: int) -> None:
        """The executor is told once, whatever goes wrong here: the request would wait for ever."""
        self._is_answered = True
        self._desk.executor.complete_onboard(self.request.request_id, num_blocks)

    def _give_back(self) -> None:
        self._is_answered = True
        self._desk.executor.abort(self.request.request_id)
        self._desk.executor.end_import(self.request.request_id)


def _by_tier(leased: Leased, begin: int, end: int) -> tuple[int, ...]:
    """How many of the leased blocks from `begin` to `end` come from each tier."""
    counts, start = [0] * len(Tier), 0
    for tier, count in [(run.tier, run.num_blocks) for run in leased.runs] or enumerate(leased.tiers):
        counts[tier] += max(0, min(start + count, end) - max(start, begin))
        start += count
    return tuple(counts)
