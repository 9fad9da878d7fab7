from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from kelp.core.errors import ConfigError
from kelp.sim.comparison import Conditions, compare
from kelp.sim.contestants import Contestant
from kelp.sim.fleet import FleetSpec
from kelp.sim.report import SLA, Report, Shape, Timeline, summarise
from kelp.sim.report_table import to_table
from kelp.sim.requests import SimRequest, Workload
from kelp.sim.result import FleetTable, OutcomeTable, SimResult
from kelp.sim.run import Progress

SLA_1S = SLA(ttft_s=1.0, itl_s=0.1)


def workload_of(*requests: tuple[float, int, int]) -> Workload:
    rows = tuple(SimRequest(at_s, num_prompt, num_output, ()) for at_s, num_prompt, num_output in requests)
    return Workload("made", 16, rows)


def result_of(
    first_token_s: Sequence[float], end_s: Sequence[float], cached: Sequence[int], busy_s: Sequence[float] = (1.0, 1.0)
) -> SimResult:
    table = OutcomeTable(len(end_s))
    table.first_token_s[:] = first_token_s
    table.end_s[:] = end_s
    table.num_cached_tokens[:] = cached
    zeros = np.zeros(len(busy_s), np.int64)
    busy = np.array(busy_s, np.float64)
    workers = FleetTable(busy, zeros, zeros, zeros, zeros, zeros, np.ones(len(busy_s)))
    return SimResult(table, workers, duration_s=10.0, cpu_s=3.0, router_stats={"z": 1.0, "a": 2.0})


WORKLOAD = workload_of((0.0, 100, 11), (1.0, 300, 1), (2.0, 600, 21))
RESULT = result_of([0.5, 2.5, 2.5], [1.0, 2.5, 12.5], [50, 150, 0], [4.0, 6.0])


def test_times_are_counted_from_the_arrival() -> None:
    timeline = Timeline.of(Shape.of(WORKLOAD), RESULT)
    assert timeline.ttft_s.tolist() == [0.5, 1.5, 0.5]
    assert timeline.itl_s.tolist() == [0.05, 0.0, 0.5]
    assert timeline.e2e_s.tolist() == [1.0, 1.5, 10.5]


def test_a_request_is_good_only_if_both_targets_are_met() -> None:
    assert Timeline.of(Shape.of(WORKLOAD), RESULT).is_good(SLA_1S).tolist() == [True, False, False]


def test_a_run_is_summed_up() -> None:
    report = summarise("mine", Shape.of(WORKLOAD), RESULT, SLA_1S)
    assert report.hit_share == 200 / 1000
    assert report.ttft.mean == pytest.approx(2.5 / 3) and report.ttft.p50 == 0.5
    assert report.ttft.p99 == pytest.approx(np.percentile([0.5, 1.5, 0.5], 99))
    assert report.itl.mean == pytest.approx((0.05 + 0.5) / 2), "a single token has no time between tokens"
    assert report.goodput_rps == 1 / 2.0 and report.goodput_share == pytest.approx(1 / 3)
    assert report.busy_share == 0.5
    assert report.busy_variation == pytest.approx(1 / 5) and report.busy_peak == pytest.approx(6 / 5)


def test_refused_requests_are_bad_and_in_no_percentile() -> None:
    refused = result_of([0.5, np.inf, np.inf], [1.0, np.inf, np.inf], [50, 0, 0])
    report = summarise("mine", Shape.of(WORKLOAD), refused, SLA_1S)
    assert report.num_refused == 2 and report.goodput_share == pytest.approx(1 / 3)
    assert report.ttft.p99 == report.ttft.mean == 0.5
    assert report.hit_share == 0.5


def test_a_run_in_which_everything_was_refused_is_all_zero() -> None:
    nothing = result_of([np.inf] * 3, [np.inf] * 3, [0] * 3, [0.0, 0.0])
    report = summarise("mine", Shape.of(WORKLOAD), nothing, SLA_1S)
    assert report.num_refused == 3
    assert (report.hit_share, report.ttft.p99, report.goodput_rps, report.busy_variation) == (0, 0, 0, 0)


@pytest.mark.parametrize(("ttft_s", "itl_s", "option"), [(0.0, 1.0, "--sla-ttft-ms"), (1.0, -1.0, "--sla-itl-ms")])
def test_targets_that_nothing_can_meet_are_refused(ttft_s: float, itl_s: float, option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        SLA(ttft_s, itl_s)


def fake_run(conditions: Conditions, contestant: Contestant, on_progress: Progress | None) -> SimResult:
    assert on_progress is not None
    on_progress(3, 3)
    return replace(RESULT, cpu_s=np.random.default_rng().random())


def report_of(workload: Workload = WORKLOAD) -> Report:
    conditions = Conditions(workload, FleetSpec(num_workers=2), sla=SLA_1S, options={"seed": 0})
    return compare(conditions, [Contestant("kelp"), Contestant("dynamo", {"temperature": 0.5})], fake_run).report


def test_policies_stand_side_by_side_with_the_bounds() -> None:
    report = report_of()
    assert [policy.policy for policy in report.policies] == ["kelp", "dynamo,temperature=0.5"]
    assert report.setting.pooled_bound == report.setting.infinite_bound == 0.0
    assert report.setting.rate_rps == 1.5


def test_the_document_is_the_same_for_the_same_run_whatever_time_it_took() -> None:
    text = report_of().to_json()
    assert text == report_of().to_json()
    policy = json.loads(text)["policies"][0]
    assert policy["hit_share"] == 0.2 and list(policy["router"]) == ["a", "z"]
    assert "cpu_s" not in text


def test_a_workload_at_one_instant_has_no_rate_in_the_document() -> None:
    setting = json.loads(report_of(workload_of((0.0, 100, 11), (0.0, 300, 1), (0.0, 600, 21))).to_json())["setting"]
    assert setting["rate_rps"] == 0.0


def test_the_table_shows_every_policy_and_the_refused_if_there_are_any() -> None:
    report = report_of()
    text = rendered(report)
    assert "dynamo,temperature=0.5" in text and "20.0%" in text and "refused" not in text
    some_refused = Report(report.setting, [replace(policy, num_refused=7) for policy in report.policies])
    assert "refused" in rendered(some_refused) and " 7 " in rendered(some_refused)


def rendered(report: Report) -> str:
    console = Console(width=160, no_color=True)
    with console.capture() as captured:
        console.print(to_table(report))
    return captured.get()
