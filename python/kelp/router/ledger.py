"""What is done whenever a placed request takes a step: the selector counts it, the other routers and the queue hear.

One object, so that no step is told to one of them and forgotten for another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kelp.core.metrics import (
    DECISIONS,
    ONBOARDED_TIER_BLOCKS,
    PREDICTED_BLOCKS,
    PREDICTED_TIER_BLOCKS,
    PROMPT_BLOCKS,
    TTFT_RATIO,
    MetricFamily,
    Metrics,
)
from kelp.core.types import Tier
from kelp.router.decision.selector import Decision, Ended, FirstToken, Selector
from kelp.router.replicas.loads import OwnLoads
from kelp.router.replicas.messages import ActiveLoad
from kelp.timing.rates import Work


def _nothing() -> None:
    pass


class Ledger:
    """Belongs to one event loop.

    Attributes:
        on_room: Called when a worker may have become less full.
        on_news: Called when `own` has something to tell.
    """

    def __init__(self, selector: Selector, own: OwnLoads, policy: str, metrics: Metrics) -> None:
        self._selector = selector
        self._own = own
        self._policy = policy
        self._metrics = metrics
        self.on_room: Callable[[], None] = _nothing
        self.on_news: Callable[[], None] = _nothing

    def reserve(self, decision: Decision) -> None:
        """A request is to be sent there; to be announced then, or before."""
        self._selector.reserve(decision)

    def announce(self, decision: Decision) -> None:
        """Tell the other routers, and count it: neither helps the request, so both can wait until it has been sent."""
        request_id = decision.request.request_id
        entries = self._selector.entries(request_id)
        if entries:
            first, last = entries[0], entries[-1]
            self._own.add(
                ActiveLoad(
                    request_id=request_id,
                    decode=decision.decode.key,
                    prefill=None if decision.prefill is None else decision.prefill.key,
                    kv_tokens=int(last.kv_tokens),
                    work=first.work or Work(0.0),
                )
            )
            self.on_news()
        self._count(decision)

    def commit(self, decision: Decision) -> None:
        """It has been sent; a reservation that has lapsed meanwhile is made again."""
        request_id = decision.request.request_id
        if not self._selector.commit(request_id):
            self._selector.reserve(decision)
            self._selector.commit(request_id)

    def first_token(self, decision: Decision, told: FirstToken, seconds: float) -> None:
        """Its prompt has been computed, so long after it was reserved."""
        request_id = decision.request.request_id
        self._selector.first_token(request_id, told)
        self._own.prefilled(request_id)
        self._count_tiers(ONBOARDED_TIER_BLOCKS, told.onboarded_blocks)
        if decision.ttft_s > 0.0:
            self._metrics.observe(TTFT_RATIO, seconds / decision.ttft_s)
        self.on_news()
        self.on_room()

    def transferred(self, decision: Decision, seconds: float) -> None:
        """Its KV has reached the decode worker."""
        self._selector.transferred(decision.request.request_id, seconds)

    def progress(self, decision: Decision, num_tokens: int) -> None:
        """So many more tokens came."""
        self._selector.progress(decision.request.request_id, num_tokens)

    def free(self, decision: Decision, ended: Ended) -> None:
        """Nothing of it runs any more."""
        request_id = decision.request.request_id
        self._selector.free(request_id, ended)
        self._own.free(request_id)
        self.on_news()
        self.on_room()

    def _count(self, decision: Decision) -> None:
        way = "aggregated" if decision.prefill is None else "disaggregated"
        self._metrics.add(DECISIONS, policy=self._policy, way=way)
        self._metrics.add(PROMPT_BLOCKS, len(decision.request.block_hashes))
        if decision.way is not None:
            self._metrics.add(PREDICTED_BLOCKS, decision.way.overlap_blocks)
            self._count_tiers(PREDICTED_TIER_BLOCKS, decision.way.onboarded_blocks)

    def _count_tiers(self, family: MetricFamily, num_blocks: Sequence[int]) -> None:
        for tier, count in zip(Tier, num_blocks, strict=False):
            if count:
                self._metrics.add(family, count, tier=tier.name.lower())
