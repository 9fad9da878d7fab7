"""What `make chaos` complains of."""

from __future__ import annotations

import pytest
from perf.resilience.gate import complaints

from kelp.chaos.leaks import Leak
from kelp.chaos.report import Report
from kelp.chaos.verdict import Judgement, Outcome, Tally


def make_report(
    num_completed: int, *others: Judgement, leaks: tuple[Leak, ...] = (), unhealed: tuple[str, ...] = ()
) -> Report:
    tally = Tally()
    for judgement in (*(Judgement(Outcome.COMPLETED) for _ in range(num_completed)), *others):
        tally.add(judgement)
    return Report({}, tally, 0, 0.0, (), (), leaks, unhealed)


FAILED, SHED = Judgement(Outcome.FAILED, "WORKER_LOST"), Judgement(Outcome.SHED, "OVERLOADED")


@pytest.mark.parametrize(
    "reports",
    [
        [make_report(5), make_report(7)],
        [make_report(5, *[SHED] * 40)],
        [make_report(500, FAILED), make_report(499)],
    ],
)
def test_nothing_is_wrong_with_a_thousandth_failed_and_any_number_shed(reports: list[Report]) -> None:
    assert complaints(reports) == []


@pytest.mark.parametrize(
    ("reports", "word"),
    [
        ([make_report(300, FAILED), make_report(90, FAILED)], "390 of 392"),
        ([make_report(0, SHED)], "0 of 0"),
        ([make_report(5000, Judgement(Outcome.WRONG, num_wrong_tokens=3))], "3 wrong tokens"),
        ([make_report(5000), make_report(5000, Judgement(Outcome.HUNG))], "1 hangs"),
        ([make_report(5, leaks=(Leak("port", "8001"),))], "1 leaks"),
        ([make_report(5, unhealed=("decode", "llm"))], "2 parts"),
    ],
)
def test_what_must_not_be_is_named(reports: list[Report], word: str) -> None:
    (complaint,) = complaints(reports)
    assert word in complaint
