"""One simulation of a case, boiled down to figures small enough to come from another process."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from kelp.sim.bound import hit_share, pooled_hits, prompt_tokens
from kelp.sim.comparison import Conditions, run_policy
from kelp.sim.contestants import Contestant
from kelp.sim.report import Percentiles, Shape, Timeline, goodput_rps
from kelp.sim.result import SimResult
from perf.sim.cases import TARGETS, Case, workload_of

NUM_SEGMENTS = 2
"""Parts of a run that count as pairs of their own: three seeds alone give no interval."""

_NUM_PROCESSES = 2


@dataclass(frozen=True, slots=True)
class Figures:
    """Of all requests of a run, or of a segment of it.

    Attributes:
        goodput: Requests/s that met the SLA.
        num_refused: Never served.
    """

    goodput: float
    ttft_mean: float
    ttft_p99: float
    hit_share: float
    num_refused: int = 0


@dataclass(frozen=True, slots=True)
class Trial:
    """What to simulate; `contestant` None computes the pooled hit bound instead."""

    case: Case
    contestant: Contestant | None
    seed: int
    is_tuning: bool = False


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What came of it.

    Attributes:
        segments: By order of arrival, `NUM_SEGMENTS` of them.
        busy_share: Of all workers' time.
        cpu_s: Processor time of the simulation.
    """

    trial: Trial
    whole: Figures
    segments: tuple[Figures, ...]
    busy_share: float = 0.0
    cpu_s: float = 0.0


def run_trial(trial: Trial) -> TrialResult:
    """Simulate, in this process."""
    workload = workload_of(trial.case, trial.seed, trial.is_tuning)
    fleet = trial.case.fleet(workload)
    if trial.contestant is None:
        hits, tokens = pooled_hits(workload, fleet.size * fleet.num_blocks), prompt_tokens(workload)
        shares = [hit_share(hits[part], tokens[part]) for part in _parts(len(tokens))]
        whole, *segments = (Figures(0.0, 0.0, 0.0, share) for share in (hit_share(hits, tokens), *shares))
        return TrialResult(trial, whole, tuple(segments))
    result = run_policy(Conditions(workload, fleet, trial.seed), trial.contestant)
    shape = Shape.of(workload)
    segments_of = tuple(_figures(shape, result, part) for part in _parts(len(workload.requests)))
    whole_run = _figures(shape, result, slice(None))
    return TrialResult(trial, whole_run, segments_of, float(result.busy_share.mean()), result.cpu_s)


def _parts(num_requests: int) -> Iterator[slice]:
    edges = [num_requests * part // NUM_SEGMENTS for part in range(NUM_SEGMENTS + 1)]
    return (slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False))


def _figures(shape: Shape, result: SimResult, part: slice) -> Figures:
    timeline = Timeline.of(shape, result)
    served = np.isfinite(timeline.e2e_s[part])
    ttft = Percentiles.of(timeline.ttft_s[part][served])
    tokens = shape.prompt_tokens[part][served]
    return Figures(
        goodput=goodput_rps(shape.arrival_s[part], timeline.is_good(TARGETS)[part]),
        ttft_mean=ttft.mean,
        ttft_p99=ttft.p99,
        hit_share=hit_share(result.table.num_cached_tokens[part][served], tokens),
        num_refused=int((~served).sum()),
    )


class TrialPool:
    """Two processes that simulate; leaving the context drops what has not begun and waits for what has."""

    def __init__(self, num_processes: int = _NUM_PROCESSES) -> None:
        self._pool = ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"), initializer=_ignore_interrupts)

    def __enter__(self) -> TrialPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, trials: Iterable[Trial]) -> list[Future[TrialResult]]:
        """Queue trials; they run in this order."""
        return [self._pool.submit(run_trial, trial) for trial in trials]


def _ignore_interrupts() -> None:
    """Ctrl-C reaches the whole process group; the parent alone decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
