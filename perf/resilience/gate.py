"""`make chaos`: three minutes of every kind of fault on mock workers, in both layouts, as CI runs it.

Status 1 if a token was wrong, a request hung, anything was left behind or did not come back, a kind of fault that the
machine can do hit nobody, or fewer than 99.5 % of the requests that were not shed were answered; then it says where the
fleets' logs are. Nothing here is a measurement, and deadlines are such that a machine several times slower passes.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from kelp.chaos.faults import Layout
from kelp.chaos.fleet_spec import FleetSpec, StoreSpec, quick_settings
from kelp.chaos.report import Report
from kelp.chaos.runner import run_served
from kelp.core.errors import ConfigError
from perf.resilience.chaos import RATE, make_spec, object_stores, summary, tell
from perf.resilience.fleets import temporary_folder

_ENGINE = "mock"
_LAYOUTS = (Layout.ISOLATED, Layout.COMPACT)
_SEED = 6
_SECONDS = 170.0
"""Each fault that comes late has some seconds more: with them it is three minutes."""
_NUM_USERS = 4
_DEADLINE_S = 120.0
"""A router or worker that takes half a minute to come back, and is hit again, costs no request."""
_RECOVERY_WAIT_S = 45.0
_LEAST_SHARE = 0.995
"""Of some 900 requests one is more than the 0.1 % of `make bench SUITE=resilience LONG=1`, which has enough of them."""


@dataclass(frozen=True, slots=True)
class Options:
    """How long, and drawn from which seed."""

    seconds: float = _SECONDS
    seed: int = _SEED


def complaints(reports: Sequence[Report]) -> list[str]:
    """What must not be; empty if all is well."""
    tallies = [report.tally for report in reports]
    asked, completed = sum(tally.num_to_complete for tally in tallies), sum(tally.num_completed for tally in tallies)
    counts = {
        "wrong tokens": sum(tally.num_wrong_tokens for tally in tallies),
        "hangs": sum(report.num_hangs for report in reports),
        "leaks": sum(len(report.leaks) for report in reports),
        "parts that did not come back": sum(len(report.unhealed) for report in reports),
        "warnings at the stop": sum(len(report.warnings) for report in reports),
    }
    found = [f"{count} {what}" for what, count in counts.items() if count]
    done = {item.fault.kind for report in reports for item in report.faults if item.is_done}
    if missed := {kind.value for report in reports for kind in report.kinds_not_done if kind not in done}:
        found.append(f"kinds of fault that hit nobody: {', '.join(sorted(missed))}")
    if completed < _LEAST_SHARE * asked or not asked:
        found.append(f"{completed} of {asked} requests completed, fewer than {_LEAST_SHARE:.1%}")
    return found


def play(options: Options, logs: Path) -> list[Report]:
    """One run for each layout, half of the time each.

    Raises:
        ConfigError: A fleet did not come up.
    """
    reports = []
    with object_stores(len(_LAYOUTS), say) as stores:
        for layout, store in zip(_LAYOUTS, stores, strict=True):
            reports.append(_play_one(layout, store, options, logs / layout.value))
    return reports


def _play_one(layout: Layout, store: StoreSpec | None, options: Options, logs: Path) -> Report:
    settings = {**quick_settings(_ENGINE), "router.recovery_wait_s": str(_RECOVERY_WAIT_S)}
    fleet = FleetSpec(layout, _ENGINE, settings=settings, store=store)
    spec = make_spec(fleet, options.seconds / len(_LAYOUTS), RATE, options.seed)
    spec = replace(spec, num_users=_NUM_USERS, deadline_s=_DEADLINE_S)
    started_s = time.monotonic()
    with temporary_folder() as folder:
        report = run_served(spec, fleet, folder, {"seed": options.seed}, say, logs)
    (logs / "report.json").write_text(report.to_json())
    tell(report, say)
    say(f"{layout.value}: {summary(report)}; {time.monotonic() - started_s:.0f} s")
    return report


def say(line: str) -> None:
    """A line of progress."""
    print(f"chaos: {line}", flush=True)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="of load, both layouts together")
    parser.add_argument("--seed", type=int, default=_SEED, help="the same seed plays the same faults")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    logs = Path(tempfile.mkdtemp(prefix="kelp-chaos-logs-"))
    try:
        found = complaints(play(Options(given.seconds, given.seed), logs))
    except ConfigError as error:
        found = [error.text]
    if not found:
        shutil.rmtree(logs)
        say("clean")
        return 0
    say(f"NOT clean: {'; '.join(found)}. Logs and reports: {logs}; seed {given.seed} plays it again")
    return 1


def _end(number: int, _frame: FrameType | None) -> None:
    # SystemExit passes through the event loop, so that the fleet is stopped on the way out.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
