"""Runs one suite: `python -m perf.run SUITE [--long]`, from the repository root.

Exit status: 0 when every required row was measured (a missed bar is in the row's `ok`), 1 when one was not, 2 for an
unknown suite, 128 + signal when interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from types import FrameType

from perf.machine import REPOSITORY, current_commit, describe_machine, load_average
from perf.reporter import Reporter
from perf.rows import RunContext
from perf.suite import BenchError, Suite
from perf.suites import SUITES

RESULTS = REPOSITORY / "perf" / "results"


def run_suite(suite: Suite, reporter: Reporter, is_long: bool) -> bool:
    """Run a suite and write what it left out.

    Returns:
        Whether every required row was measured.
    """
    trouble = "the run was interrupted"
    try:
        suite.run(reporter, is_long)
        trouble = "the suite ended before this was measured"
    except BenchError as error:
        trouble = str(error)
    finally:
        for required in suite.required:
            reporter.explain(required.case, trouble)
        reporter.add_missing()
    return not reporter.unmeasured()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.run", description="Run one benchmark suite.")
    parser.add_argument("suite", help="; ".join(f"{suite.name}: {suite.summary}" for suite in SUITES.values()))
    parser.add_argument("--long", action="store_true", help="more rounds and requests")
    return parser.parse_args(arguments)


def _exit_on(signal_number: int, _frame: FrameType | None) -> None:
    # SystemExit unwinds the stack, so every server and client is stopped on the way out.
    raise SystemExit(128 + signal_number)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parse(arguments)
    suite = SUITES.get(options.suite)
    if suite is None:
        print(f"unknown suite {options.suite!r}; there are: {', '.join(sorted(SUITES))}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _exit_on)
    started_s = time.monotonic()
    context = RunContext(suite.name, current_commit(), describe_machine(), load_average())
    print(f"{suite.name}: {context.machine}; commit {context.commit}; load before {context.load:.2f}")
    path = RESULTS / f"{suite.name}.jsonl"
    reporter = Reporter(context, suite.required, path, sys.stdout)
    is_complete = run_suite(suite, reporter, options.long)
    reporter.say(f"{time.monotonic() - started_s:.0f} s; rows in {path.relative_to(REPOSITORY)}")
    if not is_complete:
        reporter.say(f"{len(reporter.unmeasured())} required rows were not measured")
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
