from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

import pytest
from perf.rows import judge
from perf.sim import cases, scale, trials
from perf.sim.cases import CASES, SYNTHETIC, Case, case_named
from perf.sim.contest import Contest
from perf.sim.tables import BOUND, KELP, METRICS, RIVALS, CaseResult, bar_of, required_rows, rows_of
from perf.sim.trials import NUM_SEGMENTS, Figures, Trial, TrialResult
from perf.suite import BenchError
from perf.suites import SUITES

from kelp.sim.bound import hit_share, pooled_hits, prompt_tokens
from kelp.sim.contestants import Contestant, parse_contestant
from kelp.sim.scale import ScaleFigures
from kelp.sim.sweep import GRIDS, combinations, score

CASE = case_named("mooncake_synthetic_w8_medium")
SEEDS = (1, 2, 3)


def result_of(figures: Figures, contestant: Contestant | None = None, seed: int = 1) -> TrialResult:
    return TrialResult(Trial(CASE, contestant, seed), figures, (figures,) * NUM_SEGMENTS)


def runs_of(figures: Figures) -> list[TrialResult]:
    return [result_of(figures, seed=seed) for seed in SEEDS]


def test_every_trace_has_cases_at_four_eight_and_sixteen_workers() -> None:
    for workload in {case.workload for case in CASES}:
        assert {case.num_workers for case in CASES if case.workload == workload} == {4, 8, 16}
    assert len({case.name for case in CASES}) == len(CASES)


def test_an_unknown_case_is_refused() -> None:
    with pytest.raises(BenchError, match="no such case"):
        case_named("mooncake_w9")


def test_every_rival_is_required_on_every_metric_and_so_is_the_bound() -> None:
    names = {(row.case, row.metric) for row in required_rows()}
    for metric in METRICS:
        for rival in ("dynamo", "dynamo-tuned", "sglang", "sglang-tuned", "least-loaded", "round-robin"):
            assert (CASE.name, f"{metric.name}/{rival}") in names
    assert (CASE.name, "hit_share/pooled-bound") in names
    assert all(
        (scale_case.name, "cpu_per_request") in {(r.case, r.metric) for r in SUITES["sim"].required}
        for scale_case in scale.SCALE_CASES
    )


def test_the_bars_are_the_issues() -> None:
    by_name = {metric.name: metric for metric in METRICS}
    assert bar_of(CASE, by_name["goodput"], "sglang-tuned") == bar_of(CASE, by_name["ttft_p99"], "dynamo") == 0.98
    assert bar_of(CASE, by_name["ttft_mean"], "round-robin") == 2.0
    assert bar_of(CASE, by_name["ttft_mean"], "dynamo") is None
    assert bar_of(case_named("sessions_w8_small"), by_name["ttft_mean"], "round-robin") is None


def test_rows_carry_kelps_figure_the_rivals_and_a_ratio_that_is_better_above_one() -> None:
    result = CaseResult(CASE, {name: runs_of(Figures(4.0, 2.0, 10.0, 0.5)) for name in RIVALS})
    result.runs[KELP] = runs_of(Figures(5.0, 1.0, 5.0, 0.45))
    result.runs[BOUND] = runs_of(Figures(0.0, 0.0, 0.0, 0.6))
    rows = {row.metric: row for row in rows_of(result)}
    assert set(rows) == {row.metric for row in required_rows() if row.case == CASE.name}
    p99, bound = rows["ttft_p99/dynamo"].comparison, rows["hit_share/pooled-bound"].comparison
    assert p99 is not None and p99.ratio is not None and bound is not None and bound.ratio is not None
    assert (rows["ttft_p99/dynamo"].value, p99.value) == (5.0, 10.0) and p99.ratio.value == pytest.approx(2.0)
    assert bound.ratio.value == pytest.approx(0.75)
    assert not judge(rows["hit_share/pooled-bound"], True).is_ok, "75 % of the bound is below the bar"
    assert judge(rows["ttft_mean/round-robin"], True).is_ok, "exactly twice as good is enough"


def test_refused_requests_make_a_row_untrustworthy() -> None:
    result = CaseResult(CASE, {name: runs_of(Figures(4.0, 2.0, 10.0, 0.5)) for name in (*RIVALS, KELP, BOUND)})
    result.runs["dynamo"] = runs_of(Figures(4.0, 2.0, 10.0, 0.5, num_refused=2))
    rows = {row.metric: row for row in rows_of(result)}
    assert rows["goodput/dynamo"].trouble == "6 requests were refused" and not rows["goodput/sglang"].trouble


def test_a_rival_without_any_good_request_is_beaten_rather_than_not_measured() -> None:
    result = CaseResult(CASE, {name: runs_of(Figures(4.0, 2.0, 10.0, 0.5)) for name in (*RIVALS, KELP, BOUND)})
    result.runs["round-robin"] = runs_of(Figures(0.0, 2.0, 10.0, 0.5))
    row = next(row for row in rows_of(result) if row.metric == "goodput/round-robin")
    assert row.comparison is not None and row.comparison.value == 0.0
    assert judge(row, True).is_ok


class FakePool:
    """Answers at once: the better, the larger the sum of a contestant's parameters."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []

    def start(self, wanted: Iterable[Trial]) -> list[Future[TrialResult]]:
        futures = []
        for trial in wanted:
            self.trials.append(trial)
            future: Future[TrialResult] = Future()
            goodput = 1.0 + sum(trial.contestant.parameters.values()) if trial.contestant else 0.0
            figures = Figures(goodput, 1.0, 1.0, 0.5)
            future.set_result(TrialResult(trial, figures, (figures,) * NUM_SEGMENTS))
            futures.append(future)
        return futures


def test_rivals_are_tuned_on_the_first_half_and_one_seed_and_reported_on_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("perf.sim.contest.rate_of", lambda case: 1.0)
    pool, said = FakePool(), []
    (result,) = Contest(pool, SEEDS, said.append).run([CASE])  # type: ignore[arg-type]
    tuning = [trial for trial in pool.trials if trial.is_tuning]
    assert {trial.seed for trial in tuning} == {cases.TUNING_SEED} and cases.TUNING_SEED not in SEEDS
    assert {trial.contestant.policy for trial in tuning if trial.contestant} == {"dynamo", "sglang"}
    assert set(result.runs) == {KELP, BOUND, *RIVALS}
    for name, runs in result.runs.items():
        assert [run.trial.seed for run in runs] == list(SEEDS) and not any(run.trial.is_tuning for run in runs), name
    tuned = result.runs["dynamo-tuned"][0].trial.contestant
    assert tuned is not None
    assert tuned.parameters == {name: max(values) for name, values in GRIDS["dynamo"].items()}
    assert tuned.label in said[0]
    assert result.runs["dynamo"][0].trial.contestant == Contestant("dynamo")


def test_every_combination_is_one_that_its_policy_takes_and_all_get_equally_many() -> None:
    for policy in GRIDS:
        assert len(combinations(policy)) == 6
        for contestant in combinations(policy):
            assert parse_contestant(contestant.label) == contestant
    assert combinations("round-robin") == []


def test_the_score_prefers_goodput_and_short_tails() -> None:
    assert score(2.0, 1.0) > score(1.0, 1.0) > score(1.0, 2.0) > score(0.0, 2.0)


@pytest.fixture
def sample_case(monkeypatch: pytest.MonkeyPatch) -> Case:
    sample = Path(cases.__file__).parent / "sample" / "mooncake_synthetic_200.jsonl.gz"
    monkeypatch.setattr(cases, "trace_path", lambda _: sample)
    cases.rate_of.cache_clear()
    cases._whole.cache_clear()
    yield Case(SYNTHETIC, 2, "tiny", 512 * 512)
    cases.rate_of.cache_clear()
    cases._whole.cache_clear()


def test_a_trial_reports_the_second_half_at_the_cases_rate_in_segments(sample_case: Case) -> None:
    result = trials.run_trial(Trial(sample_case, Contestant("round-robin"), seed=1))
    assert len(result.segments) == NUM_SEGMENTS and result.whole.ttft_p99 > result.whole.ttft_mean > 0
    assert result.whole.num_refused == 0
    bound = trials.run_trial(Trial(sample_case, None, seed=1)).whole.hit_share
    second = cases.workload_of(sample_case, 1, is_tuning=False)
    assert len(second.requests) == 100
    assert bound == hit_share(pooled_hits(second, 2 * 512), prompt_tokens(second))
    assert 0 <= result.whole.hit_share < 1


def test_more_workers_are_given_a_higher_rate(sample_case: Case) -> None:
    assert cases.rate_of(Case(SYNTHETIC, 8, "tiny", 512 * 512)) > 3 * cases.rate_of(sample_case)


def test_an_absent_trace_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cases, "TRACES", tmp_path)
    assert str(tmp_path) in cases.trouble_of(SYNTHETIC) and not cases.trouble_of(cases.SESSIONS)


def test_scale_cases_are_named_by_workers_and_requests() -> None:
    assert [case.name for case in scale.SCALE_CASES] == ["scale_10w_50k", "scale_100w_50k", "scale_1000w_50k"]
    assert scale.MILLION.name == "scale_1000w_1m"


def test_the_million_has_fifteen_minutes() -> None:
    _, total = scale.rows_of(ScaleFigures(1000, 1_000_000, 1000.0, 1.0, 0.5, 0.5, 1))
    assert judge(total, False).reason == "ratio 0.90 is below the bar of 1.0"
    per_request, _ = scale.rows_of(ScaleFigures(10, 1000, 1.0, 1.0, 0.5, 0.5, 1))
    assert per_request.value == 1000.0
