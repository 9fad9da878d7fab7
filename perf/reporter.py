"""Prints rows as they come, keeps them in perf/results, and says at the end what lacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from perf.rows import Measurement, RequiredRow, Row, RunContext, judge, make_row

_HEADER = f"{'case':<19} {'metric':<28} {'value':>10} {'unit':<12} {'ratio':>7} {'95 % interval':<15} against"


class Reporter:
    """Turns measurements into rows.

    Args:
        context: What all rows of the run share.
        required: Rows that must be there at the end.
        path: JSON lines go here; an older file is replaced.
        screen: The table goes here.
    """

    def __init__(self, context: RunContext, required: Sequence[RequiredRow], path: Path, screen: TextIO) -> None:
        self._context = context
        self._required = {(row.case, row.metric): row for row in required}
        self._measured: set[tuple[str, str]] = set()
        self._reported: set[tuple[str, str]] = set()
        self._troubles: dict[str, str] = {}
        self._path = path
        self._screen = screen
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.say(_HEADER)

    def say(self, text: str) -> None:
        """One line of progress that is not a row."""
        print(text, file=self._screen, flush=True)

    def add(self, measurement: Measurement) -> Row:
        """Print and write one row."""
        key = (measurement.case, measurement.metric)
        required = self._required.get(key)
        verdict = judge(measurement, required is not None and required.needs_reference)
        self._reported.add(key)
        if verdict.is_measured:
            self._measured.add(key)
        row = make_row(self._context, measurement, verdict)
        with self._path.open("a") as file:
            file.write(row.to_json() + "\n")
        self.say(format_row(row))
        return row

    def explain(self, case: str, trouble: str) -> None:
        """Remember why rows of a case will be missing; the first explanation counts."""
        self._troubles.setdefault(case, trouble)

    def add_missing(self) -> None:
        """Write a row for everything required that was not reported."""
        for key, required in self._required.items():
            if key not in self._reported:
                trouble = self._troubles.get(required.case, "")
                self.add(Measurement(required.case, required.metric, required.unit, None, trouble=trouble))

    def unmeasured(self) -> list[RequiredRow]:
        """Required rows that are missing or could not be measured properly."""
        return [required for key, required in self._required.items() if key not in self._measured]


def format_row(row: Row) -> str:
    """One line of the table."""
    value = "-" if row.value is None else _figure(row.value)
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    interval = "" if row.ratio_low is None else f"{row.ratio_low:.2f}..{row.ratio_high:.2f}"
    against = "" if row.reference_value is None else f"{row.reference} ({_figure(row.reference_value)})"
    note = "" if row.ok else f"  NOT OK: {row.reason}"
    line = f"{row.case:<19} {row.metric:<28} {value:>10} {row.unit:<12} {ratio:>7} {interval:<15} {against}{note}"
    return line.rstrip()


def _figure(value: float) -> str:
    magnitude = abs(value)
    digits = 0 if magnitude >= 1000 else 1 if magnitude >= 100 else 2 if magnitude >= 1 else 3
    return f"{value:,.{digits}f}"
