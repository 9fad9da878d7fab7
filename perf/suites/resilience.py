"""Resilience: chaos under a verified load, overload, rolling restart, what killed workers and supervision cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from perf.reporter import Reporter
from perf.resilience import chaos, overload, supervision, worker_kill
from perf.rows import RequiredRow
from perf.suite import BenchError, Suite


def run(reporter: Reporter, is_long: bool) -> None:
    """See `Suite.run`."""
    parts: Sequence[tuple[tuple[str, ...], Callable[[Reporter, bool], None]]] = (
        ((chaos.CHAOS,), chaos.run_chaos),
        ((chaos.ROLLING,), chaos.run_rolling),
        ((worker_kill.WORKER_KILL,), worker_kill.run),
        ((overload.OVERLOAD,), overload.run),
        ((supervision.SUPERVISION,), supervision.run),
    )
    for cases, part in parts:
        started_s = time.monotonic()
        try:
            part(reporter, is_long)
        except BenchError as error:
            for case in cases:
                reporter.explain(case, str(error))
        reporter.say(f"({', '.join(cases)}: {time.monotonic() - started_s:.0f} s)")


_REQUIRED: tuple[RequiredRow, ...] = (*chaos.REQUIRED, *overload.REQUIRED, *worker_kill.REQUIRED, *supervision.REQUIRED)
SUITE = Suite(
    name="resilience",
    summary="chaos, overload, rolling restart, killed workers, cost of supervision",
    required=_REQUIRED,
    run=run,
)
