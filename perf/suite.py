"""What a suite is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from perf.reporter import Reporter
from perf.rows import RequiredRow


class BenchError(Exception):
    """Something could not be measured; the message says what and why."""


@dataclass(frozen=True, slots=True)
class Suite:
    """One `make bench SUITE=name`.

    Attributes:
        required: Rows that every run must print.
        run: Measures and reports. Gets whether the run may be long. Raises BenchError where nothing at all can be
            measured; the rest of the required rows are then written with its message.
    """

    name: str
    summary: str
    required: tuple[RequiredRow, ...]
    run: Callable[[Reporter, bool], None]
