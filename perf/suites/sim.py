"""kelp's routing policy against others in the simulator, on the Mooncake traces and on sessions of our own.

Simulated figures are exact for a seed, so the machine's noise is not in them; intervals come from seeds and segments.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from perf.machine import REPOSITORY
from perf.reporter import Reporter
from perf.sim import scale, tables
from perf.sim.cases import CASES, REPORT_SEEDS, REPORT_SEEDS_LONG, trouble_of
from perf.sim.contest import Contest
from perf.sim.trials import TrialPool
from perf.suite import Suite

_PLOT: Path = REPOSITORY / "perf" / "results" / "sim_scale.png"


def _run_contest(reporter: Reporter, is_long: bool) -> None:
    there = []
    for workload, group in groupby(CASES, key=lambda case: case.workload):
        trouble = trouble_of(workload)
        for case in group:
            if trouble:
                reporter.explain(case.name, trouble)
            else:
                there.append(case)
    with TrialPool() as pool:
        contest = Contest(pool, REPORT_SEEDS_LONG if is_long else REPORT_SEEDS, reporter.say)
        for result in contest.run(there):
            for measurement in tables.rows_of(result):
                reporter.add(measurement)


def _run_scale(reporter: Reporter, is_long: bool) -> None:
    if not is_long:
        reporter.say(f"({scale.MILLION.name} takes minutes: LONG=1 runs it)")
    results = []
    for result in scale.measure([*scale.SCALE_CASES, *([scale.MILLION] if is_long else [])]):
        results.append(result)
        for measurement in scale.rows_of(result):
            reporter.add(measurement)
    reporter.say(scale.plot(results[: len(scale.SCALE_CASES)], _PLOT))


def run(reporter: Reporter, is_long: bool) -> None:
    """See `Suite.run`."""
    _run_scale(reporter, is_long)
    _run_contest(reporter, is_long)


SUITE = Suite(
    name="sim",
    summary="routing policies in the simulator: goodput, TTFT and hit share; cost of a simulated request",
    required=(*tables.required_rows(), *scale.required_rows()),
    run=run,
)
