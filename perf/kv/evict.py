"""Eviction in the tier below the workers' own blocks: prefill saved by the default policy, others and the bound.

Cases are `evict_<workload>_<size>`: the lower tier holds so many per cent of the workload's unique blocks, the upper
one 1 %; `..._single` has no upper tier. Constants of the policies were chosen on the first half of each trace and of
the sessions of seed 0; rows report second halves, caches cold, and sessions of other seeds. Simulated figures are
exact, so the ratio is of the sums; its interval resamples parts of the runs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kelp.core.config_kv import EvictionName
from kelp.kv.eviction.catalogue import POLICY_NAMES
from kelp.sim.eviction import DEFAULT_SIZES, DEFAULT_UPPER, Stream, make_stream, replay_named
from kelp.sim.eviction_bound import clairvoyant_s
from kelp.sim.eviction_report import CLAIRVOYANT, require_bounded
from kelp.sim.pacing import halves
from kelp.sim.requests import Workload
from kelp.sim.sessions import make_sessions
from kelp.sim.traces import read_trace
from perf.reporter import Reporter
from perf.rows import Comparison, Measurement, RequiredRow
from perf.sim.cases import CONVERSATION, REPORT_SEEDS, REPORT_SEEDS_LONG, SESSIONS, SYNTHETIC, trace_path, trouble_of
from perf.stats import Pair, Ratio, percentile

DEFAULT: EvictionName = "cost"
RIVALS: tuple[str, ...] = (*(name for name in POLICY_NAMES if name != DEFAULT), CLAIRVOYANT)
TOTAL = "evict_all"
"""Sum of what is saved in all cases."""

_METRIC = "saved/{}"
_UNIT = "share of prefill"
_REFERENCE = "lru"
_BAR, _TOTAL_BAR = 1.0, 1.01
_NAMES = {CONVERSATION: "conversation", SYNTHETIC: "synthetic", SESSIONS: "sessions"}
_UPPERS = {"": DEFAULT_UPPER, "_single": 0.0}
_NUM_SESSION_REQUESTS = 8000
_SESSION_RATE = 8.0
_SESSION_BLOCK_SIZE = 128
_NUM_PARTS = {CONVERSATION: 8, SYNTHETIC: 8, SESSIONS: 3}
"""Of each run."""
_RESAMPLES = 1000
_RESAMPLING_SEED = 5


@dataclass(frozen=True, slots=True)
class Case:
    """One size of one set-up."""

    workload: str
    kind: str
    size: float

    @property
    def name(self) -> str:
        """As rows spell it."""
        return f"evict_{_NAMES[self.workload]}_{self.size * 100:g}pct{self.kind}"


CASES = tuple(Case(workload, kind, size) for workload in _NAMES for kind in _UPPERS for size in DEFAULT_SIZES)
CASE_NAMES = (*(case.name for case in CASES), TOTAL)
REQUIRED = tuple(
    RequiredRow(name, _METRIC.format(rival), _UNIT, needs_reference=True) for name in CASE_NAMES for rival in RIVALS
)


@dataclass(slots=True)
class Saved:
    """Shares of the prefill time that each policy saves, by part of the runs; they add up to the share of all."""

    by_policy: dict[str, list[float]]

    def total(self, policy: str) -> float:
        """Share of all."""
        return math.fsum(self.by_policy[policy])

    def against(self, rival: str) -> list[Pair]:
        """The default policy's and a rival's, part by part."""
        return [Pair(*pair) for pair in zip(self.by_policy[DEFAULT], self.by_policy[rival], strict=True)]


def run(reporter: Reporter, is_long: bool) -> None:
    """Measure and report all cases; those of absent traces are explained."""
    seeds = REPORT_SEEDS_LONG if is_long else REPORT_SEEDS
    measured: list[Saved] = []
    for workload in _NAMES:
        cases = [case for case in CASES if case.workload == workload]
        if trouble := trouble_of(workload):
            for name in (*(case.name for case in cases), TOTAL):
                reporter.explain(name, trouble)
            continue
        for kind, upper in _UPPERS.items():
            streams = [make_stream(half, upper) for half in _second_halves(workload, seeds)]
            for case in (case for case in cases if case.kind == kind):
                measured.append(measure(streams, case.size, _NUM_PARTS[workload]))
                for row in rows_of(case.name, measured[-1]):
                    reporter.add(row)
    if len(measured) == len(CASES):
        for row in rows_of(TOTAL, _sum(measured)):
            reporter.add(row)


def measure(streams: Sequence[Stream], size: float, num_parts: int) -> Saved:
    """Play every policy on all streams.

    Raises:
        InternalError: A policy saves more than the bound.
    """
    saved: dict[str, list[float]] = {name: [] for name in (*POLICY_NAMES, CLAIRVOYANT)}
    total_s = math.fsum(stream.total_s for stream in streams)
    for stream in streams:
        runs = {CLAIRVOYANT: clairvoyant_s(stream, stream.num_slots(size))}
        for name in POLICY_NAMES:
            runs[name] = replay_named(stream, name, size)
            require_bounded(stream.name, name, sum(runs[name]), sum(runs[CLAIRVOYANT]))
        for policy, saved_s in runs.items():
            saved[policy] += [math.fsum(part) / total_s for part in _parts(saved_s, num_parts)]
    return Saved(saved)


def rows_of(case: str, saved: Saved) -> Iterator[Measurement]:
    """The rows of one case."""
    for rival in RIVALS:
        bar = None if rival != _REFERENCE else _TOTAL_BAR if case == TOTAL else _BAR
        comparison = Comparison(rival, saved.total(rival), ratio_of_sums(saved.against(rival)), bar)
        yield Measurement(case, _METRIC.format(rival), _UNIT, saved.total(DEFAULT), comparison)


def ratio_of_sums(pairs: Sequence[Pair]) -> Ratio | None:
    """What one side saves in all over what the other does, with a bootstrap interval over parts; None over nothing."""
    if not math.fsum(pair.reference for pair in pairs):
        return None
    generator = random.Random(_RESAMPLING_SEED)
    resampled = [
        ratio for _ in range(_RESAMPLES) if (ratio := _ratio(generator.choices(pairs, k=len(pairs)))) is not None
    ]
    value = _ratio(pairs)
    assert value is not None
    return Ratio(value, percentile(resampled, 0.025), percentile(resampled, 0.975))


def _ratio(pairs: Sequence[Pair]) -> float | None:
    reference = math.fsum(pair.reference for pair in pairs)
    return math.fsum(pair.value for pair in pairs) / reference if reference else None


def _second_halves(workload: str, seeds: Sequence[int]) -> Iterator[Workload]:
    if workload != SESSIONS:
        yield halves(read_trace(trace_path(workload)))[1]
        return
    for seed in seeds:
        drawn = make_sessions(_NUM_SESSION_REQUESTS, _SESSION_RATE, seed, block_size=_SESSION_BLOCK_SIZE)
        yield halves(drawn)[1]


def _parts(values: Sequence[float], count: int) -> Iterator[Sequence[float]]:
    edges = [len(values) * part // count for part in range(count + 1)]
    return (values[start:stop] for start, stop in zip(edges, edges[1:], strict=False))


def _sum(measured: Sequence[Saved]) -> Saved:
    """All cases together; each case is a part."""
    return Saved({name: [saved.total(name) for saved in measured] for name in measured[0].by_policy})
