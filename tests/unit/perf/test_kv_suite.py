"""The kv suite: rows from samples, break-even lengths, and what does not count."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys

import pytest
from perf.kv import evict, markdown, offload, onboard, rates, synthetic
from perf.kv.asking import Reply, make_request
from perf.kv.break_even import BreakEven, break_even
from perf.kv.onboard import Samples, fault_of
from perf.kv.synthetic_messages import SyntheticResult, SyntheticSpec
from perf.kv.tier_messages import TierRates
from perf.reporter import Reporter
from perf.rows import Comparison, Measurement, RunContext, judge
from perf.stats import Pair, Ratio
from perf.suites import SUITES, kv

from kelp.core.types import Tier

ISSUE_CASES = {
    **{f"onboard_{length}": {f"ttft_{tier}/recompute" for tier in ("g2", "g3", "g4")} for length in (512, 2048, 7680)},
    "offload_cost": {"itl_p50/off", "itl_p99/off"},
}


def samples(bring_s: float = 0.1, compute_s: float = 1.0, count: int = 5) -> Samples:
    cells = [(length, tier) for tier in onboard.TIERS for length in onboard.lengths_of(tier)]
    return Samples({cell: [Pair(bring_s * cell[0] / 512, compute_s * cell[0] / 512)] * count for cell in cells})


def test_the_suite_requires_every_case_of_the_issue():
    required = {}
    for row in SUITES["kv"].required:
        required.setdefault(row.case, set()).add(row.metric)
    for case, metrics in ISSUE_CASES.items():
        assert metrics <= required[case]
    for case in ("g2_read", "g2_write", "g3_read", "g3_write", "g4_read", "g4_write"):
        assert any(metric.startswith("gbps/") for metric in required[case])
    assert {row.case for row in evict.REQUIRED} <= required.keys()


def test_parts_report_exactly_what_they_require():
    def keys(rows):
        return {(row.case, row.metric) for row in rows}

    assert keys(onboard.measurements(samples())) == keys(onboard.REQUIRED)
    assert keys(synthetic.measurements(SyntheticResult())) == keys(synthetic.REQUIRED)
    assert keys(rates.measurements(TierRates())) == keys(rates.REQUIRED)
    figures = {"itl_p50": 1.0, "itl_p99": 2.0}
    assert keys(offload.measurements([offload.Round(figures, figures)] * 5, 1.0)) == keys(offload.REQUIRED)


@pytest.mark.parametrize(("faster", "is_ok"), [(5.1, True), (4.9, False)])
def test_2048_tokens_from_the_host_tier_have_to_be_five_times_as_fast(faster: float, is_ok: bool):
    rows = {(row.case, row.metric): row for row in onboard.measurements(samples(1.0 / faster, 1.0))}
    assert judge(rows["onboard_2048", "ttft_g2/recompute"], True).is_ok is is_ok
    assert judge(rows["onboard_2048", "ttft_g3/recompute"], True).is_ok
    assert judge(rows["onboard_512", "ttft_g2/recompute"], True).is_ok


def test_too_few_samples_are_not_measured_and_say_what_went_wrong():
    few = samples(count=4)
    few.troubles[512, Tier.DISK] = "blocks were found elsewhere"
    row = next(
        row for row in onboard.measurements(few) if (row.case, row.metric) == ("onboard_512", "ttft_g3/recompute")
    )
    verdict = judge(row, True)
    assert not verdict.is_measured
    assert verdict.reason == "4 samples: blocks were found elsewhere"


@pytest.mark.parametrize(
    ("cached", "found", "fault"),
    [
        (512, {"disk": 32.0, "host": 0.0}, ""),
        (496, {"disk": 31.0, "host": 1.0}, ""),
        (256, {"disk": 16.0}, "256 of 512 tokens were onboarded"),
        (512, {"disk": 2.0, "host": 30.0}, "elsewhere than in g3"),
        (512, {}, "elsewhere than in g3"),
    ],
)
def test_only_what_came_from_the_tier_in_question_counts(cached: int, found: dict[str, float], fault: str):
    said = fault_of(Reply(0.1, cached), 512, Tier.DISK, found)
    assert fault in said
    assert bool(said) is bool(fault)


def test_the_break_even_length_is_where_both_cost_the_same():
    lengths = (512, 2048, 7680)
    bring = {length: 0.1 + 1e-5 * length for length in lengths}
    compute = {length: 0.01 + 1e-4 * length for length in lengths}
    assert break_even(bring, compute).tokens == pytest.approx(1000.0)
    assert break_even(bring, compute).bound == ""


def superlinear_s(tokens: float) -> float:
    return 2e-4 * tokens + 2.5e-7 * tokens**2


@pytest.mark.parametrize("fixed_s", [0.03, 0.1])
def test_a_superlinear_curve_moves_the_break_even_length_within_two_measured_ones(fixed_s: float):
    bring = {length: fixed_s + 1e-5 * length for length in onboard.MEASURED}
    found = break_even(bring, {length: superlinear_s(length) for length in onboard.MEASURED})
    assert found.bound == ""
    below, above = max(n for n in bring if n <= found.tokens), min(n for n in bring if n > found.tokens)
    assert superlinear_s(below) <= bring[below]
    assert superlinear_s(above) > bring[above]
    assert superlinear_s(found.tokens) == pytest.approx(fixed_s + 1e-5 * found.tokens, rel=0.2)


def test_a_superlinear_curve_makes_up_no_break_even_length_below_those_measured():
    bring = {length: 0.012 + 1e-5 * length for length in onboard.MEASURED}
    compute = {length: superlinear_s(length) for length in onboard.MEASURED}
    assert break_even(bring, compute) == BreakEven(64, "below")


def test_nothing_is_said_beyond_the_measured_lengths():
    assert break_even({64: 0.01, 2048: 0.04}, {64: 1.0, 2048: 4.0}) == BreakEven(64, "below")
    assert break_even({64: 1.0, 2048: 4.0}, {64: 0.5, 2048: 1.0}) == BreakEven(2048, "above")
    assert break_even({64: 0.1, 2048: 4.0}, {64: 0.5, 2048: 1.0}) == BreakEven(2048, "above"), "dearer per token"
    assert break_even({512: 1.0}, {512: 1.0}) == BreakEven(512, "above")


def test_of_several_crossings_the_last_one_counts():
    bring = {64: 1.0, 128: 3.0, 256: 1.0}
    assert break_even(bring, {64: 2.0, 128: 2.0, 256: 2.0}) == BreakEven(192)


def test_the_object_tier_is_not_asked_for_less_than_a_group():
    assert onboard.lengths_of(Tier.OBJECT) == (128, 256, 512, 2048, 7680)
    assert onboard.lengths_of(Tier.HOST) == (64, 128, 256, 512, 2048, 7680)


@pytest.mark.parametrize(("slower", "is_ok"), [(1.05, True), (1.06, False)])
def test_offload_may_cost_a_twentieth_of_the_median(slower: float, is_ok: bool):
    rounds = [offload.Round({"itl_p50": slower, "itl_p99": 1.0}, {"itl_p50": 1.0, "itl_p99": 1.0})] * 10
    row = next(row for row in offload.measurements(rounds, 1.0) if row.metric == "itl_p50/off")
    assert judge(row, True).is_ok is is_ok


@pytest.mark.parametrize(("best", "is_ok"), [(0.92, True), (0.90, False)])
def test_the_bar_of_the_99th_percentile_binds_what_the_interval_excludes(best: float, is_ok: bool):
    comparison = Comparison("off", 1.0, Ratio(0.8, 0.7, best), bar=1 / 1.1, is_bar_for_best=True)
    verdict = judge(Measurement("c", "m", "ms", 1.0, comparison), True)
    assert verdict.is_measured
    assert verdict.is_ok is is_ok


def test_disk_reads_have_a_bar_against_reads_into_either_memory():
    found = TierRates({"g3_read": {"tier": [0.7] * 5, "odirect": [0.8] * 5, "odirect_elsewhere": [1.0] * 5}})
    rows = {(row.case, row.metric): row for row in rates.measurements(found)}
    assert judge(rows["g3_read", "gbps/odirect"], True).is_ok
    assert not judge(rows["g3_read", "gbps/odirect_elsewhere"], True).is_ok
    assert judge(rows["g4_read", "gbps/boto3_x8"], True).reason == "nothing was measured"


def test_specs_and_results_survive_the_pipe():
    spec = SyntheticSpec((512, 2048), 5, "http://e", "bucket")
    assert SyntheticSpec.from_json(json.dumps(dataclasses.asdict(spec))) == spec
    result = SyntheticResult(g2_read=[(1.0, 2.0)])
    result.add("g3", 512, 0.25)
    again = SyntheticResult.from_json(json.dumps(dataclasses.asdict(result)))
    assert again.onboard == {"g3": {"512": [0.25]}}
    found = TierRates(troubles={"g4_read": "no store"})
    assert TierRates.from_json(json.dumps(dataclasses.asdict(found))) == found


def test_synthetic_seconds_are_compared_with_the_stated_rate():
    result = SyntheticResult()
    for length in synthetic.MEASURED:
        for _ in range(5):
            result.add("g2", length, length / 100_000)
    rows = {(row.case, row.metric): row for row in synthetic.measurements(result)}
    row = rows["onboard_8b_2048", "seconds_g2/recompute"]
    assert row.comparison is not None and row.comparison.ratio is not None
    assert row.comparison.ratio.value == pytest.approx(10.0)
    found = rows["break_even_8b", "tokens_g2"]
    assert (found.value, found.unit) == (64, "tokens at 10000/s, or below")
    assert rows["break_even_8b", "tokens_g4"].value is None


def test_a_request_names_its_tokens_and_its_worker():
    request = make_request([5, 6, 7], "decode_1")
    assert request.parameters["kelp_worker"].string_param == "decode_1"
    names = [tensor.name for tensor in request.inputs]
    raw = request.raw_input_contents[names.index("input_ids")]
    assert struct.unpack("<3i", raw) == (5, 6, 7)


def test_the_tables_of_the_documentation_have_a_place_for_every_row_of_a_run():
    figures = {"value": 100.0, "reference_value": 200.0, "ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1}
    required = [row for row in SUITES["kv"].required if row.metric != "stored_share"]
    lines = [json.dumps({"case": row.case, "metric": row.metric, **figures}) for row in required]
    full, empty = list(markdown.tables(markdown.read_rows(lines))), list(markdown.tables({}))
    assert len(full) == len(empty)
    assert not any("|  |" in line for line in full)
    for row in required:
        assert any(f"`{row.case}`" in line for line in empty)
    assert "| `onboard_2048` | 200 | 100: 2.00 (1.90-2.10) |" in "\n".join(full)


@pytest.mark.parametrize(("bound", "shown"), [("", "100"), ("below", "below 100"), ("above", "above 100")])
def test_the_tables_say_on_which_side_of_the_measured_lengths_it_breaks_even(bound: str, shown: str):
    row = {"case": "break_even", "metric": "tokens_g2", "value": 100.0, "unit": BreakEven(100, bound).unit("tokens")}
    assert f"| `break_even` | {shown} |  |  |" in list(markdown.tables(markdown.read_rows([json.dumps(row)])))


def test_a_part_that_breaks_is_explained_and_leaves_the_others_alone(tmp_path, capsys):
    context = RunContext("kv", "c", "m", 0.0)
    reporter = Reporter(context, rates.REQUIRED[:1], tmp_path / "rows.jsonl", sys.stdout)

    def breaks() -> None:
        raise OSError("no space")

    kv._part(reporter, "rates", rates.REQUIRED, breaks)
    reporter.add_missing()
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert (row["ok"], row["reason"]) == (False, "OSError: no space")
    assert "Traceback" in capsys.readouterr().out
