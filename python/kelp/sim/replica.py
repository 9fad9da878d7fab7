"""The real router in a simulation: selector, worker table and index as the Triton router has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kelp.core.clock import Clock
from kelp.core.config import RoutingConfig
from kelp.core.kv_events import KVEvent
from kelp.core.types import WorkerKey
from kelp.router.decision.choosing import SelectorMode
from kelp.router.decision.selector import Selector
from kelp.router.decision.workers import WorkerTable
from kelp.router.index.kv_index import KVIndex
from kelp.sim.contestants import Contestant
from kelp.sim.routing import RoutingFactory

_OWN_POLICY = "kelp"


class Replica(Selector):
    """See `sim.routing.Routing`."""

    def __init__(self, contestant: Contestant, clock: Clock, seed: int) -> None:
        self._workers = WorkerTable()
        self._blocks = KVIndex(clock)
        self._workers.watch(lambda _: None, self._blocks.clear)
        mode = SelectorMode(policy=contestant.policy)
        super().__init__(self._workers, self._blocks, _config(contestant), clock, seed, mode)

    def apply(self, worker: WorkerKey, events: Sequence[KVEvent]) -> None:
        """Events of one worker, in order; of one that is not known any more they are ignored."""
        slot = self._workers.slot(worker)
        if slot is not None:
            for event in events:
                self._blocks.apply(slot, event)

    def stats(self) -> Mapping[str, float]:
        """Size of the index at the end."""
        return {"index_blocks": float(self._blocks.num_blocks), "index_bytes": float(self._blocks.num_bytes)}


def _config(contestant: Contestant) -> RoutingConfig:
    # Affinity is kelp's own; a rival's policy must decide alone, as it would at home.
    affinity = "prefer" if contestant.policy == _OWN_POLICY else "off"
    return RoutingConfig(policy_parameters=dict(contestant.parameters), session_affinity=affinity, explained_bytes=0)


def routing_of(contestant: Contestant) -> RoutingFactory:
    """Makes routers that choose by this policy."""
    return lambda clock, seed: Replica(contestant, clock, seed)
