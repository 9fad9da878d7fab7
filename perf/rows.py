"""What a benchmark reports: measurements, and the rows they become on screen and in perf/results.

A row has exactly the fields of design §8. Nothing here measures, and nothing here knows a suite.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass

from perf.stats import Ratio


@dataclass(frozen=True, slots=True)
class Comparison:
    """A reference, measured in the same run.

    Attributes:
        reference: What it is.
        value: Its figure, in the unit of the measurement.
        ratio: Above 1 is better than the reference; None where it could not be computed.
        bar: Least acceptable ratio, or None where the comparison only informs.
        is_bar_for_best: The bar is for the best ratio that the interval does not exclude.
    """

    reference: str
    value: float
    ratio: Ratio | None
    bar: float | None = None
    is_bar_for_best: bool = False


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure of one case.

    Attributes:
        value: None where nothing could be measured.
        trouble: Why the figure is missing or must not be trusted; empty otherwise.
    """

    case: str
    metric: str
    unit: str
    value: float | None
    comparison: Comparison | None = None
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class RequiredRow:
    """A row that a suite must print, and whether it means anything without its reference."""

    case: str
    metric: str
    unit: str
    needs_reference: bool = False


@dataclass(frozen=True, slots=True)
class RunContext:
    """What is equal in all rows of a run; `load` is the 1-minute load average before it started."""

    suite: str
    commit: str
    machine: str
    load: float


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON line; the order of the fields is the order in the file."""

    suite: str
    case: str
    metric: str
    value: float | None
    unit: str
    reference: str
    reference_value: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    bar: float | None
    ok: bool
    reason: str
    commit: str
    machine: str
    load: float

    def to_json(self) -> str:
        """One line without the newline."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a measurement counts: `is_measured` decides the exit status, `is_ok` what the row says."""

    is_measured: bool
    is_ok: bool
    reason: str


def judge(measurement: Measurement, needs_reference: bool) -> Verdict:
    """Decide what a measurement is worth."""
    comparison = measurement.comparison
    ratio = comparison.ratio if comparison is not None else None
    if measurement.trouble:
        return Verdict(False, False, measurement.trouble)
    if measurement.value is None or not math.isfinite(measurement.value):
        return Verdict(False, False, "nothing was measured")
    if needs_reference and ratio is None:
        return Verdict(False, False, "the reference was not measured")
    bar = comparison.bar if comparison is not None else None
    if bar is None:
        return Verdict(True, True, "")
    if ratio is None:
        return Verdict(False, False, f"the bar of {bar} has no ratio to be compared with")
    judged = ratio.high if comparison is not None and comparison.is_bar_for_best else ratio.value
    if judged < bar:
        return Verdict(True, False, f"ratio {judged:.2f} is below the bar of {bar}")
    return Verdict(True, True, "")


def make_row(context: RunContext, measurement: Measurement, verdict: Verdict) -> Row:
    """Join a measurement with the run it belongs to."""
    comparison = measurement.comparison
    ratio = comparison.ratio if comparison is not None else None
    return Row(
        suite=context.suite,
        case=measurement.case,
        metric=measurement.metric,
        value=_finite(measurement.value),
        unit=measurement.unit,
        reference=comparison.reference if comparison else "",
        reference_value=_finite(comparison.value) if comparison else None,
        ratio=ratio.value if ratio else None,
        ratio_low=ratio.low if ratio else None,
        ratio_high=ratio.high if ratio else None,
        bar=comparison.bar if comparison else None,
        ok=verdict.is_ok,
        reason=verdict.reason,
        commit=context.commit,
        machine=context.machine,
        load=context.load,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
