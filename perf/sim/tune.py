"""Tries settings of a policy on the tuning half: `python -m perf.sim.tune POLICY [--case NAME]... [--try SPEC]...`.

The tool that kelp's defaults come from; the suite runs the same trials for the rivals.
"""

from __future__ import annotations

import argparse
import sys

from kelp.core.errors import ConfigError
from kelp.sim import sweep
from kelp.sim.contestants import Contestant, parse_contestant
from perf.sim.cases import CASES, TUNING_SEED, Case, case_named, rate_of
from perf.sim.trials import Trial, TrialPool, TrialResult
from perf.suite import BenchError


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.sim.tune", description=__doc__)
    parser.add_argument("policy", nargs="*", help="policies whose grids of sim.sweep are tried")
    parser.add_argument(
        "--try", action="append", default=[], dest="extra", help="policy,field=value,... to try as well"
    )
    parser.add_argument(
        "--case", action="append", default=[], help=f"one of {', '.join(c.name for c in CASES)}; or all"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, action="append", default=[], help=f"instead of {TUNING_SEED}")
    return parser.parse_args(arguments)


def _line(result: TrialResult) -> str:
    whole, trial = result.whole, result.trial
    label = trial.contestant.label if trial.contestant else "pooled bound"
    score = sweep.score(whole.goodput, whole.ttft_p99)
    return (
        f"{trial.case.name:<32} seed {trial.seed} {label:<60} score {score:7.3f} goodput {whole.goodput:7.3f} "
        f"ttft mean {whole.ttft_mean:7.3f} p99 {whole.ttft_p99:8.3f} hits {whole.hit_share:.3f} "
        f"busy {result.busy_share:.2f} cpu {result.cpu_s:.1f} s"
    )


def _trials(cases: list[Case], contestants: list[Contestant], seeds: list[int]) -> list[Trial]:
    everybody: list[Contestant | None] = [*contestants, None]
    return [
        Trial(case, contestant, seed, is_tuning=True) for case in cases for contestant in everybody for seed in seeds
    ]


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parse(arguments)
    try:
        cases = [case_named(name) for name in options.case] or list(CASES)
        extra = [parse_contestant(text) for text in options.extra]
        policies = [parse_contestant(name).policy for name in options.policy]
    except (BenchError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    contestants = [
        *extra,
        *(each for policy in policies for each in sweep.combinations(policy) or [Contestant(policy)]),
    ]
    with TrialPool(options.processes) as pool:
        for case in cases:
            print(f"{case.name}: {rate_of(case):.2f} requests/s", flush=True)
            for future in pool.start(_trials([case], contestants, options.seed or [TUNING_SEED])):
                print(_line(future.result()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
