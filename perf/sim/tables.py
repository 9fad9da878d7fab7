"""Which rows the sim suite prints, what kelp's policy is compared with in each, and the bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from perf.rows import Comparison, Measurement, RequiredRow
from perf.sim.cases import CASES, SYNTHETIC, Case
from perf.sim.trials import Figures, TrialResult
from perf.stats import Pair, paired_ratio

KELP = "kelp"
PLAIN_RIVALS = ("least-loaded", "round-robin")
TUNED_RIVALS = ("dynamo", "sglang")
RIVALS = (*TUNED_RIVALS, *(f"{name}-tuned" for name in TUNED_RIVALS), *PLAIN_RIVALS)
BOUND = "pooled-bound"

_AS_GOOD_AS_ANYBODY = 0.98
_OF_THE_BOUND = 0.9
_TWICE = 2.0
_FLOOR = 0.01
"""What a pair's figure counts for at least, so that a rival without a single good request still gives a ratio."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of `Figures`.

    Attributes:
        bar: Least acceptable ratio against every rival; None informs.
    """

    name: str
    unit: str
    is_lower_better: bool
    bar: float | None = None


METRICS = (
    Metric("goodput", "requests/s", False, _AS_GOOD_AS_ANYBODY),
    Metric("ttft_p99", "s", True, _AS_GOOD_AS_ANYBODY),
    Metric("ttft_mean", "s", True),
    Metric("hit_share", "share", False),
)


@dataclass(slots=True)
class CaseResult:
    """Runs of one case by contestant's name as rows spell it, `BOUND` included; in the order of seeds."""

    case: Case
    runs: dict[str, list[TrialResult]] = field(default_factory=dict)


def bar_of(case: Case, metric: Metric, rival: str) -> float | None:
    """Least acceptable ratio of kelp against a rival."""
    if metric.name == "ttft_mean" and rival == "round-robin" and (case.workload, case.num_workers) == (SYNTHETIC, 8):
        return _TWICE
    return metric.bar


def required_rows() -> Iterator[RequiredRow]:
    """Everything that a run must print of the cases."""
    for case in CASES:
        for metric in METRICS:
            for rival in RIVALS:
                yield RequiredRow(case.name, f"{metric.name}/{rival}", metric.unit, needs_reference=True)
        yield RequiredRow(case.name, f"hit_share/{BOUND}", "share", needs_reference=True)


def rows_of(result: CaseResult) -> Iterator[Measurement]:
    """The rows of one case: kelp's figure, and the ratio of kelp to the rival over seeds and segments."""
    own = result.runs[KELP]
    for metric in METRICS:
        for rival in RIVALS:
            yield _row(result.case, metric, rival, (own, result.runs[rival]), bar_of(result.case, metric, rival))
    hit_share = METRICS[-1]
    yield _row(result.case, hit_share, BOUND, (own, result.runs[BOUND]), _OF_THE_BOUND)


def _row(
    case: Case,
    metric: Metric,
    rival: str,
    runs: tuple[Sequence[TrialResult], Sequence[TrialResult]],
    bar: float | None,
) -> Measurement:
    own, other = ([run.whole for run in side] for side in runs)
    ratio = paired_ratio(_pairs(metric, runs), metric.is_lower_better)
    comparison = Comparison(rival, _mean(metric, other), ratio, bar)
    return Measurement(case.name, f"{metric.name}/{rival}", metric.unit, _mean(metric, own), comparison, _trouble(runs))


def _pairs(metric: Metric, runs: tuple[Sequence[TrialResult], Sequence[TrialResult]]) -> list[Pair]:
    return [
        Pair(max(_value(metric, one), _FLOOR), max(_value(metric, another), _FLOOR))
        for own, other in zip(*runs, strict=True)
        for one, another in zip(own.segments, other.segments, strict=True)
    ]


def _trouble(runs: tuple[Sequence[TrialResult], Sequence[TrialResult]]) -> str:
    num_refused = sum(run.whole.num_refused for side in runs for run in side)
    return f"{num_refused} requests were refused" if num_refused else ""


def _value(metric: Metric, figures: Figures) -> float:
    value: float = getattr(figures, metric.name)
    return value


def _mean(metric: Metric, figures: Sequence[Figures]) -> float:
    return sum(_value(metric, each) for each in figures) / len(figures)
