"""Fleets of mock workers to break, and rows against limits that no peer sets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kelp.chaos.fleet import ServedFleet
from kelp.chaos.fleet_spec import FleetSpec
from kelp.core.errors import ConfigError
from perf.rows import Comparison, Measurement
from perf.stats import Ratio
from perf.suite import BenchError

LIMIT = "limit"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """For a fleet; what a killed process still writes there does not matter."""
    with tempfile.TemporaryDirectory(prefix="kelp-bench-chaos-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def serving(spec: FleetSpec) -> Iterator[ServedFleet]:
    """A fleet while the block runs.

    Raises:
        BenchError: It did not come up.
    """
    with temporary_folder() as folder:
        fleet = ServedFleet(spec, folder)
        try:
            fleet.start()
        except ConfigError as error:
            raise BenchError(error.text) from None
        try:
            yield fleet
        finally:
            fleet.stop()


def none_allowed(case: str, metric: str, count: int) -> Measurement:
    """A count that must be 0."""
    ratio = 1.0 / (1.0 + count)
    return Measurement(case, metric, "count", count, Comparison(LIMIT, 0.0, Ratio(ratio, ratio, ratio), 1.0))


def at_least(case: str, metric: str, unit: str, value: float, least: float) -> Measurement:
    """A figure that must not be lower than a limit."""
    ratio = value / least
    return Measurement(case, metric, unit, value, Comparison(LIMIT, least, Ratio(ratio, ratio, ratio), 1.0))


def at_most(case: str, metric: str, unit: str, value: float, most: float) -> Measurement:
    """A figure that must not be higher than a limit."""
    ratio = most / value
    return Measurement(case, metric, unit, value, Comparison(LIMIT, most, Ratio(ratio, ratio, ratio), 1.0))
