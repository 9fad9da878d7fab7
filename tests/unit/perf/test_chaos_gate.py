"""What `make chaos` complains of."""

from __future__ import annotations

from dataclasses import replace

import pytest
from perf.resilience.gate import complaints

from kelp.chaos.done import Done
from kelp.chaos.faults import Fault, FaultKind
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


def test_a_kind_of_fault_has_to_hit_somebody_in_one_of_the_runs_unless_the_machine_cannot_do_it() -> None:
    kill, full = Fault(1.0, FaultKind.MANAGER_KILLED), Fault(2.0, FaultKind.DISK_FULL)
    missed = [Done(kill, 1.0, False, "nobody"), Done(full, 2.0, False, "needs root", is_possible=False)]
    without, beside = replace(make_report(500), faults=missed), make_report(500)
    assert complaints([without, beside]) == ["kinds of fault that hit nobody: manager-killed"]
    assert complaints([without, replace(beside, faults=[Done(kill, 1.0, True, "hit")])]) == []


def test_a_server_that_does_not_stop_in_order_is_named() -> None:
    (complaint,) = complaints([make_report(500).extended((), ("kelp serve ended with SIGKILL",))])
    assert "1 warnings at the stop" in complaint
