"""Rows, what makes them ok, and what becomes of required ones that are missing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from perf.reporter import Reporter
from perf.rows import Comparison, Measurement, RequiredRow, RunContext, judge
from perf.run import main, run_suite
from perf.stats import Ratio
from perf.suite import BenchError, Suite

_CONTEXT = RunContext("demo", "abc123", "a machine", 0.5)
_FIELDS = [
    *("suite", "case", "metric", "value", "unit", "reference", "reference_value", "ratio", "ratio_low"),
    *("ratio_high", "bar", "ok", "reason", "commit", "machine", "load"),
]
_RATIO = Ratio(1.2, 1.1, 1.3)


def measurement(value: float | None = 1.0, comparison: Comparison | None = None, trouble: str = "") -> Measurement:
    return Measurement("case", "speed", "tokens/s", value, comparison, trouble)


class Bench:
    """A reporter with its screen and file."""

    def __init__(self, folder: Path, *required: RequiredRow) -> None:
        self.screen = io.StringIO()
        self.path = folder / "results" / "demo.jsonl"
        self.reporter = Reporter(_CONTEXT, required, self.path, self.screen)

    def rows(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, RequiredRow("case", "speed", "tokens/s"), RequiredRow("other", "speed", "tokens/s"))


def test_a_row_has_exactly_the_fields_of_the_design_in_their_order(bench: Bench):
    bench.reporter.add(measurement(comparison=Comparison("peer", 2.0, _RATIO)))
    assert list(bench.rows()[0]) == _FIELDS


def test_a_row_without_a_reference_has_none_and_is_ok_once_measured(bench: Bench):
    bench.reporter.add(measurement())
    row = bench.rows()[0]
    assert (row["reference"], row["reference_value"], row["ratio"], row["bar"]) == ("", None, None, None)
    assert row["ok"] is True


def test_a_row_carries_the_run_it_belongs_to(bench: Bench):
    bench.reporter.add(measurement())
    row = bench.rows()[0]
    assert (row["suite"], row["commit"], row["machine"], row["load"]) == ("demo", "abc123", "a machine", 0.5)


def test_rows_are_printed_and_written_as_they_come(bench: Bench):
    bench.reporter.add(measurement(123.4))
    assert "123.4" in bench.screen.getvalue()
    assert len(bench.rows()) == 1
    bench.reporter.add(Measurement("other", "speed", "tokens/s", 2.0))
    assert len(bench.rows()) == 2


def test_a_ratio_below_its_bar_is_measured_but_not_ok():
    verdict = judge(measurement(comparison=Comparison("peer", 2.0, _RATIO, bar=1.5)), needs_reference=True)
    assert (verdict.is_measured, verdict.is_ok) == (True, False)
    assert "below the bar of 1.5" in verdict.reason


def test_a_ratio_at_its_bar_is_ok():
    verdict = judge(measurement(comparison=Comparison("peer", 2.0, _RATIO, bar=1.2)), needs_reference=True)
    assert verdict.is_ok


@pytest.mark.parametrize("comparison", [None, Comparison("peer", 2.0, None)])
def test_a_row_that_needs_its_reference_is_not_measured_without_it(comparison: Comparison | None):
    verdict = judge(measurement(comparison=comparison), needs_reference=True)
    assert (verdict.is_measured, verdict.reason) == (False, "the reference was not measured")


def test_a_bar_without_a_ratio_is_not_measured_even_where_the_reference_is_optional():
    verdict = judge(measurement(comparison=Comparison("peer", 2.0, None, bar=1.0)), needs_reference=False)
    assert not verdict.is_measured


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_not_measured_and_written_as_null(bench: Bench, value: float | None):
    bench.reporter.add(measurement(value))
    row = bench.rows()[0]
    assert (row["value"], row["ok"], row["reason"]) == (None, False, "nothing was measured")


def test_trouble_makes_a_row_not_ok_and_is_its_reason(bench: Bench):
    bench.reporter.add(measurement(trouble="3 of 4 requests failed"))
    row = bench.rows()[0]
    assert (row["value"], row["ok"], row["reason"]) == (1.0, False, "3 of 4 requests failed")


def test_a_required_row_that_was_left_out_is_written_with_the_reason(bench: Bench):
    bench.reporter.add(measurement())
    bench.reporter.explain("other", "the server died")
    bench.reporter.add_missing()
    row = bench.rows()[1]
    assert (row["case"], row["ok"], row["value"], row["reason"]) == ("other", False, None, "the server died")


def test_the_first_explanation_of_a_case_counts(bench: Bench):
    bench.reporter.explain("other", "the cause")
    bench.reporter.explain("other", "a consequence")
    bench.reporter.add_missing()
    assert bench.rows()[1]["reason"] == "the cause"


def test_an_older_result_file_is_replaced(tmp_path: Path):
    Bench(tmp_path).reporter.add(measurement())
    second = Bench(tmp_path)
    assert second.rows() == []


def test_a_missed_bar_still_counts_as_measured(tmp_path: Path):
    bench = Bench(tmp_path, RequiredRow("case", "speed", "tokens/s", needs_reference=True))
    bench.reporter.add(measurement(comparison=Comparison("peer", 2.0, _RATIO, bar=9.0)))
    assert bench.reporter.unmeasured() == []
    assert bench.rows()[0]["ok"] is False


def suite_of(bench: Bench, action) -> Suite:
    required = (RequiredRow("case", "speed", "tokens/s"), RequiredRow("other", "speed", "tokens/s"))
    return Suite("demo", "for tests", required, action)


def test_a_suite_that_fails_as_a_whole_gives_its_reason_to_every_row_it_had_not_written(bench: Bench):
    def action(reporter: Reporter, is_long: bool) -> None:
        reporter.add(measurement())
        raise BenchError("no model")

    assert not run_suite(suite_of(bench, action), bench.reporter, is_long=False)
    assert [(row["case"], row["ok"], row["reason"]) for row in bench.rows()] == [
        ("case", True, ""),
        ("other", False, "no model"),
    ]


def test_a_suite_that_measures_every_required_row_is_complete(bench: Bench):
    def action(reporter: Reporter, is_long: bool) -> None:
        reporter.add(measurement())
        reporter.add(Measurement("other", "speed", "tokens/s", 2.0))

    assert run_suite(suite_of(bench, action), bench.reporter, is_long=False)


def test_an_unknown_suite_is_one_line_that_names_the_known_ones(capsys: pytest.CaptureFixture[str]):
    assert main(["nonsense"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'nonsense'" in error and "serve" in error


def test_an_interrupted_suite_still_writes_every_required_row(bench: Bench):
    def action(reporter: Reporter, is_long: bool) -> None:
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        run_suite(suite_of(bench, action), bench.reporter, is_long=False)
    assert [row["reason"] for row in bench.rows()] == ["the run was interrupted"] * 2
