"""Runs the cases: rivals are tuned on the first half with one seed, everybody is reported on the second with others.

kelp's policy runs with the defaults it ships with, in all cases. Rivals run with their documented defaults, and once
more (`-tuned`) with the best of the combinations in `sim.sweep` for the case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from kelp.sim import sweep
from kelp.sim.contestants import Contestant, parse_contestant
from perf.sim.cases import TUNING_SEED, Case, rate_of
from perf.sim.tables import BOUND, KELP, PLAIN_RIVALS, TUNED_RIVALS, CaseResult
from perf.sim.trials import Trial, TrialPool, TrialResult

_Pending = list[Future[TrialResult]]


@dataclass(frozen=True, slots=True)
class _Started:
    """A case in progress: combinations being tried by rival, and reports by row name."""

    case: Case
    tuning: dict[str, _Pending]
    reports: dict[str, _Pending]


class Contest:
    """Cases on a pool of processes.

    Args:
        seeds: Of the reports.
        say: Takes a line of progress.
    """

    def __init__(self, pool: TrialPool, seeds: Sequence[int], say: Callable[[str], None]) -> None:
        self._pool = pool
        self._seeds = seeds
        self._say = say

    def run(self, cases: Sequence[Case]) -> Iterator[CaseResult]:
        """Results case by case; the next case has begun when one is waited for, so that no core idles."""
        started = [self._start(case) for case in cases[:1]]
        for number in range(len(cases)):
            started += [self._start(case) for case in cases[number + 1 : number + 2]]
            yield self._finish(started[number])

    def _start(self, case: Case) -> _Started:
        tuning = {
            name: self._pool.start(
                Trial(case, contestant, TUNING_SEED, is_tuning=True)
                for contestant in sweep.combinations(parse_contestant(name).policy)
            )
            for name in TUNED_RIVALS
        }
        names = (KELP, *TUNED_RIVALS, *PLAIN_RIVALS)
        reports = {name: self._report(case, parse_contestant(name)) for name in names}
        reports[BOUND] = self._report(case, None)
        return _Started(case, tuning, reports)

    def _report(self, case: Case, contestant: Contestant | None) -> _Pending:
        return self._pool.start(Trial(case, contestant, seed) for seed in self._seeds)

    def _finish(self, started: _Started) -> CaseResult:
        case = started.case
        chosen = {name: best_of([future.result() for future in tried]) for name, tried in started.tuning.items()}
        reports = dict(started.reports)
        for name, contestant in chosen.items():
            reports[f"{name}-tuned"] = self._report(case, contestant)
        result = CaseResult(case, {name: [future.result() for future in runs] for name, runs in reports.items()})
        settings = "; ".join(contestant.label for contestant in chosen.values())
        busy = sum(run.busy_share for run in result.runs[KELP]) / len(self._seeds)
        self._say(f"({case.name}: {rate_of(case):.2f} requests/s; kelp's workers busy {busy:.0%}; tuned: {settings})")
        return result


def best_of(results: Sequence[TrialResult]) -> Contestant:
    """The contestant with the highest `sweep.score`, the first of equals."""
    best = max(results, key=lambda result: sweep.score(result.whole.goodput, result.whole.ttft_p99))
    assert best.trial.contestant is not None
    return best.trial.contestant
