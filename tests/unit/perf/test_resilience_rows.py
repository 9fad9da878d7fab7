"""Rows against limits, and what a killed worker costs a stream."""

from __future__ import annotations

import pytest
from perf.resilience.fleets import at_least, at_most, none_allowed
from perf.resilience.worker_kill import standstill_s
from perf.rows import judge
from perf.suites.resilience import SUITE


@pytest.mark.parametrize(("count", "is_ok"), [(0, True), (1, False), (40, False)])
def test_a_count_that_must_be_zero_is_ok_only_then(count: int, is_ok: bool) -> None:
    verdict = judge(none_allowed("chaos", "hangs", count), needs_reference=False)
    assert (verdict.is_measured, verdict.is_ok) == (True, is_ok)


@pytest.mark.parametrize(("value", "is_ok"), [(1.0, True), (0.999, True), (0.9989, False), (0.0, False)])
def test_a_share_is_ok_from_its_limit_on(value: float, is_ok: bool) -> None:
    assert judge(at_least("chaos", "completed_share", "share", value, 0.999), needs_reference=False).is_ok is is_ok


@pytest.mark.parametrize(("value", "is_ok"), [(0.98, True), (1.03, True), (1.0301, False)])
def test_a_cost_is_ok_up_to_its_limit(value: float, is_ok: bool) -> None:
    verdict = judge(at_most("supervision", "cost_upper_end", "ratio", value, 1.03), needs_reference=True)
    assert (verdict.is_measured, verdict.is_ok) == (True, is_ok)


def test_a_stream_stands_still_from_the_kill_to_its_next_token_or_after_one_that_was_on_its_way() -> None:
    assert standstill_s((1.0, 2.0, 5.0, 5.1), 2.5) == 2.5
    assert standstill_s((1.0, 2.0, 3.0, 7.0, 7.5), 2.5) == 4.0
    assert standstill_s((1.0, 2.0), 6.0) == 0.0


def test_the_suite_demands_the_rows_of_its_issue() -> None:
    rows = {(row.case, row.metric) for row in SUITE.required}
    assert {
        ("chaos", "wrong_tokens"),
        ("chaos", "hangs"),
        ("chaos", "leaks"),
        ("chaos", "completed_share"),
        ("overload", "goodput_at_3x/peak"),
        ("rolling_restart", "failed"),
        ("worker_kill", "resume_p50/cold-ttft"),
        ("worker_kill", "resume_cached_p50/cold-ttft"),
        ("supervision", "cost_upper_end"),
    } <= rows
