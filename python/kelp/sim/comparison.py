"""Policies on one workload and fleet, one after the other, with the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kelp.sim.bound import hit_share, pooled_hits, prompt_tokens
from kelp.sim.contestants import Contestant
from kelp.sim.fleet import FleetSpec
from kelp.sim.pacing import rate_rps
from kelp.sim.plots import Curves
from kelp.sim.replica import routing_of
from kelp.sim.report import SLA, Report, Setting, Shape, Timeline, summarise
from kelp.sim.requests import Workload
from kelp.sim.result import SimResult
from kelp.sim.run import Progress, simulate


@dataclass(frozen=True, slots=True)
class Conditions:
    """What is equal for all policies.

    Attributes:
        options: For the reader of the report: what it was made with, JSON values.
    """

    workload: Workload
    fleet: FleetSpec
    seed: int = 0
    sla: SLA = field(default_factory=SLA)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A report, and what its plots need."""

    report: Report
    curves: Curves


Runner = Callable[[Conditions, Contestant, Progress], SimResult]
"""Simulates one policy."""

Watcher = Callable[[Contestant], Progress]
"""Whom to tell how far a policy's run is."""


def run_policy(conditions: Conditions, contestant: Contestant, on_progress: Progress | None = None) -> SimResult:
    """Simulate one policy."""
    routing = routing_of(contestant)
    return simulate(conditions.workload, conditions.fleet, routing, conditions.seed, on_progress)


def compare(
    conditions: Conditions, contestants: Iterable[Contestant], run: Runner, watch: Watcher = lambda _: lambda *_: None
) -> Comparison:
    """Run every policy and put them side by side."""
    shape = Shape.of(conditions.workload)
    policies, curves = [], Curves({}, {})
    for contestant in contestants:
        result = run(conditions, contestant, watch(contestant))
        ttft_s = Timeline.of(shape, result).ttft_s
        policies.append(summarise(contestant.label, shape, result, conditions.sla))
        curves.ttft_s[contestant.label] = ttft_s[np.isfinite(ttft_s)]
        curves.busy_share[contestant.label] = result.busy_share
    return Comparison(Report(_setting(conditions), policies), curves)


def _setting(conditions: Conditions) -> Setting:
    workload, fleet = conditions.workload, conditions.fleet
    tokens = prompt_tokens(workload)
    rate = rate_rps(workload)
    return Setting(
        workload=workload.name,
        num_requests=len(workload.requests),
        rate_rps=rate if np.isfinite(rate) else 0.0,
        sla=conditions.sla,
        options=conditions.options,
        pooled_bound=hit_share(pooled_hits(workload, fleet.size * fleet.num_blocks), tokens),
        infinite_bound=hit_share(pooled_hits(workload, None), tokens),
    )
