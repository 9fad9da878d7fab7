"""The router as the simulation sees it: the real selector with the index that it looks into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from kelp.core.clock import Clock
from kelp.core.kv_events import KVEvent
from kelp.core.types import WorkerKey
from kelp.registry.base import WorkerRecord
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.selector import Decision, Ended, FirstToken


class Routing(Protocol):
    """One router replica: `router.decision.selector.Selector`, and the way of KV events to its index."""

    def set_workers(self, records: Sequence[WorkerRecord]) -> None:
        """See `Selector`."""

    def select(self, request: RoutingRequest, avoid: frozenset[WorkerKey] = ..., allow_prefill: bool = ...) -> Decision:
        """See `Selector`."""

    def reserve(self, decision: Decision) -> None:
        """See `Selector`."""

    def commit(self, request_id: str) -> bool:
        """See `Selector`."""

    def first_token(self, request_id: str, told: FirstToken) -> None:
        """See `Selector`."""

    def progress(self, request_id: str, num_tokens: int) -> None:
        """See `Selector`."""

    def free(self, request_id: str, ended: Ended) -> None:
        """See `Selector`."""

    def apply(self, worker: WorkerKey, events: Sequence[KVEvent]) -> None:
        """Events of one worker, in order; of one that is not known any more they are ignored."""

    def stats(self) -> Mapping[str, float]:
        """Counters for the report."""


RoutingFactory = Callable[[Clock, int], Routing]
"""Makes a replica from the virtual clock and a seed of its own."""
