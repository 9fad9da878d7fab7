"""Rows of `kelp.sim.scale`: a simulated request's cost against the number of workers, and a million on a thousand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from kelp.core.errors import ConfigError
from kelp.sim.plots import require_matplotlib
from kelp.sim.scale import ScaleFigures, run_scale
from perf.rows import Comparison, Measurement, RequiredRow
from perf.stats import Ratio

_LIMIT_S = 900.0


@dataclass(frozen=True, slots=True)
class ScaleCase:
    """A fleet and how many requests it serves."""

    num_workers: int
    num_requests: int

    @property
    def name(self) -> str:
        """As rows spell it."""
        millions, rest = divmod(self.num_requests, 1_000_000)
        requests = f"{millions}m" if not rest else f"{self.num_requests // 1000}k"
        return f"scale_{self.num_workers}w_{requests}"


SCALE_CASES = tuple(ScaleCase(num_workers, 50_000) for num_workers in (10, 100, 1000))
MILLION = ScaleCase(1000, 1_000_000)


def required_rows() -> Iterator[RequiredRow]:
    """Everything that a run must print; the million runs with LONG=1 only."""
    for case in SCALE_CASES:
        yield RequiredRow(case.name, "cpu_per_request", "us")


def measure(cases: Sequence[ScaleCase]) -> Iterator[ScaleFigures]:
    """Run cases one after the other, each in a fresh process on one core."""
    for case in cases:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield pool.submit(run_scale, case.num_workers, case.num_requests).result()


def rows_of(figures: ScaleFigures) -> Iterator[Measurement]:
    """What a run took; the million has a bar."""
    case = ScaleCase(figures.num_workers, figures.num_requests)
    yield Measurement(case.name, "cpu_per_request", "us", figures.us_per_request)
    comparison = None
    if case == MILLION:
        ratio = _LIMIT_S / figures.cpu_s
        comparison = Comparison("15 minutes", _LIMIT_S, Ratio(ratio, ratio, ratio), 1.0)
    yield Measurement(case.name, "cpu", "s", figures.cpu_s, comparison)


def plot(results: Sequence[ScaleFigures], path: Path) -> str:
    """Draw cost against workers.

    Returns:
        A line for the screen: where the plot is, or why there is none.
    """
    try:
        require_matplotlib()
    except ConfigError as error:
        return f"(no plot of the cost per request: {error.text})"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r.num_workers for r in results], [r.us_per_request for r in results], "o-")
    axes.set(
        xscale="log", xlabel="workers", ylabel="CPU per request, µs", ylim=(0, None), title="kelp sim, policy kelp"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return f"(cost per request against number of workers: {path})"
