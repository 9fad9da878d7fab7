"""Rounds in which every contestant takes a turn with the same prompts; who goes first rotates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kelp.text.tokenizer import Tokenizer
from perf.executor.protocol import Job, Turn
from perf.executor.workloads import Case, make_job, tokens_per_s
from perf.stats import median
from perf.suite import BenchError

Measure = Callable[[Case, int], float]
"""One turn of a contestant: the figure of a case in a round; BenchError where there is none."""


class JobRunner(Protocol):
    """The part of an engine's process that a turn needs."""

    def run(self, job: Job) -> Turn:
        """Do a job."""


@dataclass(slots=True)
class CaseResult:
    """What came of one case.

    Attributes:
        figures: By contestant, in the order of the rounds; a contestant in trouble has fewer, or none.
        troubles: Why a contestant dropped out, or never came.
    """

    case: Case
    figures: dict[str, list[float]] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)


class EngineTurn:
    """Turns of one engine."""

    def __init__(self, engine: JobRunner, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    def __call__(self, case: Case, round_number: int) -> float:
        """Median over the jobs of a turn; see `Measure`."""
        found = []
        for repeat in range(case.repeats):
            job = make_job(case, self._tokenizer, seed=round_number * case.repeats + repeat)
            found.append(tokens_per_s(case, job, self._engine.run(job)))
        return median(found)


class Contest:
    """Everybody who is there, and the troubles of those who are not."""

    def __init__(self) -> None:
        self._measures: dict[str, Measure] = {}
        self._troubles: dict[str, str] = {}

    def join(self, name: str, measure: Measure) -> None:
        """Take part from now on."""
        self._measures[name] = measure

    def give_up(self, name: str, trouble: str) -> None:
        """Take no part any more; the first trouble counts."""
        self._measures.pop(name, None)
        self._troubles.setdefault(name, trouble)

    def run(self, case: Case, contestants: Sequence[str], num_rounds: int) -> CaseResult:
        """Measure a case; a contestant that fails is out for good."""
        result = CaseResult(case)
        for round_number in range(num_rounds):
            first = round_number % len(contestants)
            for name in (*contestants[first:], *contestants[:first]):
                self._take_turn(name, case, round_number, result)
        result.troubles = {name: self._troubles[name] for name in contestants if name in self._troubles}
        return result

    def _take_turn(self, name: str, case: Case, round_number: int, result: CaseResult) -> None:
        measure = self._measures.get(name)
        if measure is None:
            return
        try:
            figure = measure(case, round_number)
        except BenchError as error:
            self.give_up(name, str(error))
        else:
            result.figures.setdefault(name, []).append(figure)
