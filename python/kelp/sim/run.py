"""`simulate`: a workload on a fleet, decided by the real router, in virtual time.

    arrival ─► router: select, reserve, commit ─delay─► worker(s) ─delay─► client and router: first token, end
                 ▲                                         │
                 └───────────── KV events, late ───────────┘

The clients' waits end when tokens reach the router. A request whose worker leaves goes to another one with what it has
generated so far.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from kelp.sim.agenda import Agenda
from kelp.sim.fleet import Churn, FleetSpec
from kelp.sim.members import Members
from kelp.sim.requests import SimRequest, Workload
from kelp.sim.result import OutcomeTable, SimResult
from kelp.sim.routing import RoutingFactory
from kelp.sim.traffic import Traffic

Progress = Callable[[int, int], None]
"""Called now and then with the number of requests that have arrived, and of all."""

_PROGRESS_STEPS = 100


def simulate(
    workload: Workload,
    fleet: FleetSpec,
    routing: RoutingFactory,
    seed: int,
    on_progress: Progress | None = None,
    may_skip: bool = True,
) -> SimResult:
    """Run a workload to its end.

    Args:
        workload: What comes.
        fleet: Who serves it.
        routing: Makes a router (`sim.routing`); called once per replica.
        seed: Of everything random: equal arguments give equal results.
        on_progress: Hears how far it is.
        may_skip: False takes every step by itself, which is slow and gives the same result.
    """
    started_s = time.process_time()
    return _Simulation(workload, fleet, routing, seed, may_skip).run(on_progress, started_s)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A third of the time would go into looking for cycles, and there are none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Simulation:
    def __init__(
        self, workload: Workload, fleet: FleetSpec, routing: RoutingFactory, seed: int, may_skip: bool
    ) -> None:
        router_seeds, member_seeds = np.random.SeedSequence(seed).spawn(2)
        self._requests = workload.requests
        self._fleet = fleet
        self._may_skip = may_skip
        self._agenda = Agenda()
        self._routers = [
            routing(self._agenda, int(router_seed.generate_state(1)[0]))
            for router_seed in router_seeds.spawn(fleet.num_routers)
        ]
        self._table = OutcomeTable(len(workload.requests))
        self._members = Members(self._agenda, fleet, workload.block_size, self._routers, member_seeds)
        self._traffic = Traffic(self._agenda, fleet, workload.block_size, self._members, self._table)
        self._on_progress: Progress = lambda _arrived, _all: None

    def run(self, on_progress: Progress | None, started_s: float) -> SimResult:
        if on_progress is not None:
            self._on_progress = on_progress
        with _no_garbage_collection():
            self._begin()
            self._agenda.run()
        ends = self._table.end_s[np.isfinite(self._table.end_s)]
        stats: Counter[str] = Counter()
        for router in self._routers:
            stats.update(router.stats())
        return SimResult(
            table=self._table,
            workers=self._members.totals(),
            duration_s=float(ends.max(initial=0.0)),
            cpu_s=time.process_time() - started_s,
            router_stats=dict(stats),
        )

    def _begin(self) -> None:
        changes = sorted(self._fleet.churn, key=lambda change: change.at_s)
        is_late = {change.worker: change.is_joining for change in reversed(changes)}
        for index in range(self._fleet.size):
            if not is_late.get(index, False):
                self._members.join(index, self._traffic, self._may_skip)
        self._members.publish()
        for change in changes:
            self._agenda.at(change.at_s, self._change, change)
        self._await(0)

    def _change(self, change: Churn) -> None:
        member = self._members.current(change.worker)
        if change.is_joining and member is None:
            self._members.join(change.worker, self._traffic, self._may_skip)
            self._members.publish()
        elif not change.is_joining and member is not None:
            self._traffic.leave(member)

    def _await(self, index: int) -> None:
        if index < len(self._requests):
            request = self._requests[index]
            self._agenda.at(request.arrival_s, self._arrive, (index, request))

    def _arrive(self, arrival: tuple[int, SimRequest]) -> None:
        index, request = arrival
        num_requests = len(self._requests)
        self._traffic.arrive(index, request, self._routers[index % len(self._routers)])
        if index * _PROGRESS_STEPS // num_requests != (index + 1) * _PROGRESS_STEPS // num_requests:
            self._on_progress(index + 1, num_requests)
        self._await(index + 1)
