"""`kelp chaos` as it stands, in both layouts and, when there is time, with torch workers; and a rolling restart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from kelp.chaos.faults import Fault, FaultKind, Layout, kinds_for
from kelp.chaos.fleet_spec import FleetSpec, StoreSpec, quick_settings, usual_deadline_s
from kelp.chaos.report import Report
from kelp.chaos.runner import RunSpec, run_served
from kelp.chaos.schedule import ScheduleSpec
from kelp.chaos.verdict import Outcome
from kelp.core.errors import ConfigError
from perf.kv import store as object_store
from perf.reporter import Reporter
from perf.resilience.fleets import at_least, at_most, none_allowed, temporary_folder
from perf.rows import Measurement, RequiredRow
from perf.suite import BenchError

CHAOS, ROLLING = "chaos", "rolling_restart"
COMPLETED_SHARE = 0.999
LONGEST_GAP_S = 5.0
RATE = 0.3
"""On average a fault comes every 2.5 s, and none later than 3.4 s."""
_RATES = {"mock": RATE, "torch": 0.2}
"""A torch worker takes half a minute to come back."""
_ROLLING_RATE = 0.2
_SEED = 20261121
_SHOWN = 12
_POOLS = {"mock": 200, "torch": 12}
_SHORT = (
    ("mock", Layout.ISOLATED, 75.0),
    ("mock", Layout.COMPACT, 65.0),
    ("torch", Layout.ISOLATED, 40.0),
)
_LONG = (
    ("mock", Layout.ISOLATED, 600.0),
    ("mock", Layout.COMPACT, 600.0),
    ("torch", Layout.ISOLATED, 600.0),
)
_STEP_S = 12.0
"""Between two restarts: a worker is back by then."""
REQUIRED = (
    RequiredRow(CHAOS, "wrong_tokens", "count"),
    RequiredRow(CHAOS, "hangs", "count"),
    RequiredRow(CHAOS, "leaks", "count"),
    RequiredRow(CHAOS, "completed_share", "share"),
    RequiredRow(CHAOS, "faults_done", "count"),
    RequiredRow(CHAOS, "kinds_done", "count"),
    RequiredRow(CHAOS, "kinds_not_done", "count"),
    RequiredRow(CHAOS, "longest_gap", "s"),
    RequiredRow(CHAOS, "shed", "count"),
    RequiredRow(ROLLING, "failed", "count"),
    RequiredRow(ROLLING, "asked_again", "count"),
)


def run_chaos(reporter: Reporter, is_long: bool) -> None:
    """Every kind of fault, one every 5 s at least."""
    reports = []
    with object_stores(len(_LONG), reporter.say) as stores:
        for number, (engine, layout, duration_s) in enumerate(_LONG if is_long else _SHORT):
            fleet = FleetSpec(layout, engine, settings=quick_settings(engine), store=stores[number])
            spec = make_spec(fleet, duration_s, _RATES[engine], _SEED + number)
            reports.append(_play(reporter, spec, fleet))
    asked = sum(report.tally.num_to_complete for report in reports)
    completed = sum(report.tally.num_completed for report in reports)
    reporter.add(none_allowed(CHAOS, "wrong_tokens", sum(report.tally.num_wrong_tokens for report in reports)))
    reporter.add(none_allowed(CHAOS, "hangs", sum(report.num_hangs for report in reports)))
    reporter.add(none_allowed(CHAOS, "leaks", sum(report.num_left_behind for report in reports)))
    reporter.add(at_least(CHAOS, "completed_share", "share", completed / asked if asked else 0.0, COMPLETED_SHARE))
    _add_what_was_done(reporter, reports)


def _add_what_was_done(reporter: Reporter, reports: Sequence[Report]) -> None:
    for outcome in (Outcome.SHED, Outcome.LEFT, Outcome.EXPIRED, Outcome.REFUSED):
        count = sum(report.tally.outcomes[outcome] for report in reports)
        reporter.add(Measurement(CHAOS, outcome.value, "count", count))
    done = [item.fault for report in reports for item in report.faults if item.is_done]
    done_kinds, kinds = (
        {fault.kind for fault in done},
        {item.fault.kind for report in reports for item in report.faults},
    )
    reporter.add(Measurement(CHAOS, "faults_done", "count", len(done)))
    reporter.add(Measurement(CHAOS, "faults_not_done", "count", sum(len(item.faults) for item in reports) - len(done)))
    reporter.add(Measurement(CHAOS, "kinds_done", "count", len(done_kinds)))
    reporter.add(none_allowed(CHAOS, "kinds_not_done", len(kinds - done_kinds)))
    longest_s = max(report.longest_gap_s for report in reports)
    reporter.add(at_most(CHAOS, "longest_gap", "s", longest_s, LONGEST_GAP_S))
    away_s = [fault.lasts_s for fault in done if fault.kind is FaultKind.REGISTRY_GONE]
    reporter.add(Measurement(CHAOS, "registry_gone", "s", max(away_s, default=0.0)))


@contextmanager
def object_stores(count: int, say: Callable[[str], None]) -> Iterator[list[StoreSpec | None]]:
    """An object store with so many buckets; Nones where none is installed: its faults are told as not done."""
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder())
        try:
            running = stack.enter_context(object_store.running(folder))
            buckets = [running.make_bucket(f"kelp-chaos-{number}") for number in range(count)]
        except BenchError as error:
            say(f"(no object store: {error})")
            yield [None] * count
            return
        host, _, port = running.endpoint.rpartition("/")[2].partition(":")
        credentials = tuple(running.environment.items())
        yield [StoreSpec(host, int(port), bucket, credentials) for bucket in buckets]


def run_rolling(reporter: Reporter, is_long: bool) -> None:
    """Every worker, the router and the block manager, one after the other, under load, in both layouts."""
    reports = [_roll(reporter, layout, 2 if is_long else 1) for layout in Layout]
    # Nobody is meant to be shed, and no connection to break: a client that has to ask again has seen a failure.
    tallies = [report.tally for report in reports]
    reporter.add(none_allowed(ROLLING, "failed", sum(tally.num_requests - tally.num_completed for tally in tallies)))
    reporter.add(none_allowed(ROLLING, "asked_again", sum(tally.num_asked_again for tally in tallies)))


def _roll(reporter: Reporter, layout: Layout, num_rounds: int) -> Report:
    fleet = FleetSpec(layout, settings=quick_settings("mock"))
    workers = (*fleet.prefill_workers, *fleet.decode_workers)
    steps = [(FaultKind.WORKER_RELOADED, worker) for worker in workers]
    steps += [(FaultKind.ROUTER_RELOADED, ""), (FaultKind.MANAGER_RELOADED, "")]
    steps *= num_rounds
    faults = [Fault(2.0 + index * _STEP_S, kind, target) for index, (kind, target) in enumerate(steps)]
    spec = replace(make_spec(fleet, len(steps) * _STEP_S, _ROLLING_RATE, _SEED), chosen=tuple(faults))
    report = _play(reporter, spec, fleet)
    if missed := [done.note for done in report.faults if not done.is_done]:
        raise BenchError(f"{len(missed)} of {len(faults)} restarts were not done: {missed[0]}")
    return report


def make_spec(fleet: FleetSpec, duration_s: float, rate_per_s: float, seed: int) -> RunSpec:
    """A run of every kind of fault that the layout knows; a store that is missing is told."""
    kinds = kinds_for(fleet.layout, has_store=True)
    schedule = ScheduleSpec(seed, duration_s, rate_per_s, kinds, fleet.prefill_workers, fleet.decode_workers)
    return RunSpec(schedule, pool_size=_POOLS[fleet.engine], deadline_s=usual_deadline_s(fleet.engine))


def _play(reporter: Reporter, spec: RunSpec, fleet: FleetSpec) -> Report:
    started_s = time.monotonic()
    name = f"{fleet.engine}, {fleet.layout.value}"
    with temporary_folder() as folder:
        try:
            report = run_served(spec, fleet, folder, {"seed": spec.seed}, lambda line: reporter.say(f"({line})"))
        except ConfigError as error:
            raise BenchError(f"{name}: {error.text}") from None
    tell(report, lambda line: reporter.say(f"({line})"))
    reporter.say(f"({name}: {summary(report)}; {time.monotonic() - started_s:.0f} s)")
    return report


def tell(report: Report, say: Callable[[str], None]) -> None:
    """What went wrong, line by line; nothing if nothing did."""
    for answered in report.troubles[:_SHOWN]:
        from_s, to_s = answered.started_s - report.started_s, answered.ended_s - report.started_s
        told = f"{answered.judgement.outcome.value} {answered.judgement.code}: {answered.judgement.text[:120]}"
        say(f"{from_s:.1f} to {to_s:.1f} s: {told}")
    for warning in report.warnings:
        say(f"warning: {warning}")
    for leak in report.leaks[:_SHOWN]:
        say(f"leak: {leak.kind}: {leak.what}")
    for done in report.faults:
        if not done.is_done:
            say(f"not done: {done.fault.name}: {done.note}")


def summary(report: Report) -> str:
    """One line of figures."""
    num_done = sum(done.is_done for done in report.faults)
    missed = ", ".join(kind.value for kind in (*report.kinds_not_done, *report.kinds_impossible))
    return (
        f"{num_done} of {len(report.faults)} faults, {report.longest_gap_s:.1f} s at most between two that hit, "
        f"kinds not done: {missed or 'none'}; {report.tally.num_requests} requests, "
        f"{report.tally.num_completed} of {report.tally.num_to_complete} completed, {report.num_migrated} migrated, "
        f"{report.tally.outcomes[Outcome.SHED]} shed, {report.tally.num_asked_again} asked again, "
        f"not back: {', '.join(report.unhealed) or 'none'}"
    )
