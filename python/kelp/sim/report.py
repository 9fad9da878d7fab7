"""What a run was worth: hit share, latencies, goodput and balance, as numbers and JSON.

Reads results; knows nothing of how they came about. Equal runs give equal documents, so processor time is not in them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kelp.core.errors import ConfigError
from kelp.sim.requests import Workload
from kelp.sim.result import SimResult

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_MILLISECONDS = 1e3


@dataclass(frozen=True, slots=True)
class SLA:
    """What a request must meet to count as good: both figures, by itself.

    Attributes:
        ttft_s: Arrival to first token, at most.
        itl_s: Mean time per further token, at most.
    """

    ttft_s: float = 5.0
    itl_s: float = 0.2

    def __post_init__(self) -> None:
        """Raises `ConfigError` for targets that nothing can meet."""
        for option, value in (("--sla-ttft-ms", self.ttft_s), ("--sla-itl-ms", self.itl_s)):
            if not value > 0:
                raise ConfigError(f"{option} {value * _MILLISECONDS:g}: must be positive")


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds; over requests that were served."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Floats) -> Percentiles:
        """All zero where there are no values."""
        if not len(values):
            return cls(0.0, 0.0, 0.0, 0.0)
        p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
        return cls(float(values.mean()), p50, p90, p99)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the report needs of a workload, all `[num_requests]`."""

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints

    @classmethod
    def of(cls, workload: Workload) -> Shape:
        """Read a workload once."""
        rows = [(r.arrival_s, r.num_prompt_tokens, r.num_output_tokens) for r in workload.requests]
        columns = np.array(rows, np.float64).reshape(len(rows), 3).T
        return cls(columns[0], columns[1].astype(np.int64), columns[2].astype(np.int64))


@dataclass(frozen=True, slots=True)
class Timeline:
    """Each request's fate, all `[num_requests] float64` seconds; infinite where it was refused.

    Attributes:
        itl_s: Mean over the tokens after the first; 0 where there are none.
    """

    ttft_s: Floats
    itl_s: Floats
    e2e_s: Floats

    @classmethod
    def of(cls, shape: Shape, result: SimResult) -> Timeline:
        """Subtract arrivals."""
        table = result.table
        served = np.isfinite(table.end_s)
        decode_s = np.where(served, table.end_s, 0.0) - np.where(served, table.first_token_s, 0.0)
        itl_s = np.where(served, decode_s / np.maximum(shape.output_tokens - 1, 1), np.inf)
        return cls(table.first_token_s - shape.arrival_s, itl_s, table.end_s - shape.arrival_s)

    def is_good(self, sla: SLA) -> npt.NDArray[np.bool_]:
        """Which requests met the targets."""
        good: npt.NDArray[np.bool_] = (self.ttft_s <= sla.ttft_s) & (self.itl_s <= sla.itl_s)
        return good


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """One policy on one workload and fleet.

    Attributes:
        policy: As configured.
        num_requests: Of the workload.
        num_refused: Never served.
        hit_share: Prompt tokens of served requests that were not computed, of all their prompt tokens.
        ttft: Of served requests, as the next two.
        goodput_rps: Requests that met the SLA, per second of arrivals.
        goodput_share: The same, of all requests.
        busy_share: Mean share of the run that workers were busy.
        busy_variation: Standard deviation of workers' busy time over its mean: 0 is perfect balance.
        busy_peak: Busiest worker's busy time over the mean.
        duration_s: Virtual time of the last end.
        router: What the routers counted.
    """

    policy: str
    num_requests: int
    num_refused: int
    hit_share: float
    ttft: Percentiles
    itl: Percentiles
    e2e: Percentiles
    goodput_rps: float
    goodput_share: float
    busy_share: float
    busy_variation: float
    busy_peak: float
    duration_s: float
    router: Mapping[str, float] = dataclasses.field(default_factory=dict)


def summarise(policy: str, shape: Shape, result: SimResult, sla: SLA) -> PolicyReport:
    """Boil a run down."""
    timeline = Timeline.of(shape, result)
    served = np.isfinite(timeline.e2e_s)
    decoded = served & (shape.output_tokens > 1)
    busy_s = result.workers.busy_s
    mean_busy_s = float(busy_s.mean()) if len(busy_s) else 0.0
    good = timeline.is_good(sla)
    served_tokens = int(shape.prompt_tokens[served].sum())
    return PolicyReport(
        policy=policy,
        num_requests=len(served),
        num_refused=int((~served).sum()),
        hit_share=float(result.table.num_cached_tokens[served].sum()) / served_tokens if served_tokens else 0.0,
        ttft=Percentiles.of(timeline.ttft_s[served]),
        itl=Percentiles.of(timeline.itl_s[decoded]),
        e2e=Percentiles.of(timeline.e2e_s[served]),
        goodput_rps=goodput_rps(shape.arrival_s, good),
        goodput_share=float(good.mean()) if len(good) else 0.0,
        busy_share=float(result.busy_share.mean()) if len(busy_s) else 0.0,
        busy_variation=float(busy_s.std()) / mean_busy_s if mean_busy_s else 0.0,
        busy_peak=float(busy_s.max()) / mean_busy_s if mean_busy_s else 0.0,
        duration_s=result.duration_s,
        router=dict(sorted(result.router_stats.items())),
    )


def goodput_rps(arrival_s: Floats, good: npt.NDArray[np.bool_]) -> float:
    """Good requests per second of arrivals; 0 for fewer than two instants."""
    span_s = float(arrival_s[-1] - arrival_s[0]) if len(arrival_s) else 0.0
    return float(good.sum()) / span_s if span_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What all policies of a report had in common, for the reader.

    Attributes:
        options: Further settings by name, JSON values.
        pooled_bound: Hit share of one cache as large as all workers' together (`sim.bound`).
        infinite_bound: Of a cache without end.
    """

    workload: str
    num_requests: int
    rate_rps: float
    sla: SLA
    options: Mapping[str, Any]
    pooled_bound: float
    infinite_bound: float


@dataclass(frozen=True, slots=True)
class Report:
    """Policies side by side."""

    setting: Setting
    policies: Sequence[PolicyReport]

    def to_json(self) -> str:
        """The document; byte for byte equal for equal seeds."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"
