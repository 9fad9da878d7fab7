"""What a simulation found out; arrays, because there may be millions of requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kelp.sim.requests import RequestOutcome

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class OutcomeTable:
    """Outcomes of all requests, by their position in the workload.

    Attributes:
        worker: `[num_requests]`; -1 if refused, or not ended yet.
        prefill_worker: `[num_requests]`; who computed the prompt, also -1 if the decode worker did.
        num_cached_tokens: `[num_requests]`, of the last attempt.
        first_token_s: `[num_requests]`; infinite if refused.
        end_s: `[num_requests]`; infinite if refused.
        num_attempts: `[num_requests]`, 1 unless a worker left.
    """

    def __init__(self, num_requests: int) -> None:
        self.worker: Ints = np.full(num_requests, -1, np.int64)
        self.prefill_worker: Ints = np.full(num_requests, -1, np.int64)
        self.num_cached_tokens: Ints = np.zeros(num_requests, np.int64)
        self.first_token_s: Floats = np.full(num_requests, np.inf)
        self.end_s: Floats = np.full(num_requests, np.inf)
        self.num_attempts: Ints = np.zeros(num_requests, np.int64)

    def __len__(self) -> int:
        return len(self.worker)

    def outcome(self, index: int) -> RequestOutcome:
        """One request's."""
        return RequestOutcome(
            index=index,
            worker=int(self.worker[index]),
            num_cached_tokens=int(self.num_cached_tokens[index]),
            first_token_s=float(self.first_token_s[index]),
            end_s=float(self.end_s[index]),
        )


@dataclass(frozen=True, slots=True)
class FleetTable:
    """Totals of every worker.

    Attributes:
        busy_s: `[size]` virtual seconds in steps.
        num_steps: `[size]`.
        num_requests: `[size]` sequences admitted, repetitions after preemption not included.
        num_prompt_tokens: `[size]` of these.
        num_cached_tokens: `[size]` of these.
        num_preemptions: `[size]`.
        speed: `[size]` true durations relative to the timing model, at the start.
    """

    busy_s: Floats
    num_steps: Ints
    num_requests: Ints
    num_prompt_tokens: Ints
    num_cached_tokens: Ints
    num_preemptions: Ints
    speed: Floats


@dataclass(frozen=True, slots=True)
class SimResult:
    """A run.

    Attributes:
        table: Outcomes as arrays.
        workers: Totals per worker.
        duration_s: Virtual time of the last end.
        cpu_s: Processor time that the run took; the only part that differs between equal runs.
        router_stats: Whatever the routers count, summed over them.
    """

    table: OutcomeTable
    workers: FleetTable
    duration_s: float
    cpu_s: float
    router_stats: Mapping[str, float] = field(default_factory=dict)

    @property
    def outcomes(self) -> list[RequestOutcome]:
        """All outcomes as objects, by position."""
        return [self.table.outcome(index) for index in range(len(self.table))]

    @property
    def busy_share(self) -> Floats:
        """`[size]` share of the duration that each worker spent in steps."""
        return self.workers.busy_s / self.duration_s if self.duration_s else self.workers.busy_s
