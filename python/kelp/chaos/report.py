"""What a run has shown: as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from kelp.chaos.done import Done
from kelp.chaos.faults import FaultKind
from kelp.chaos.leaks import Leak, count_by_kind
from kelp.chaos.load import Answered
from kelp.chaos.verdict import Outcome, Tally

_SHOWN = 12
_TEXT_CHARS = 200


@dataclass(frozen=True, slots=True)
class Report:
    """One run.

    Attributes:
        options: What it was started with; the seed plays it again.
        num_migrated: Attempts that routers moved to another worker, as their metrics say.
        started_s: `time.monotonic()` at the start of the load.
        troubles: The first requests that failed, were wrong or hung.
        unhealed: Parts of the fleet that were not back at the end.
        warnings: What went wrong when the fleet was stopped.
        ended_s: When the schedule's time was up.
    """

    options: dict[str, Any]
    tally: Tally
    num_migrated: int
    started_s: float
    faults: Sequence[Done]
    troubles: Sequence[Answered] = ()
    leaks: Sequence[Leak] = ()
    unhealed: Sequence[str] = ()
    warnings: Sequence[str] = ()
    ended_s: float | None = None

    @property
    def num_hangs(self) -> int:
        """Requests that had not ended some seconds after their deadline."""
        return self.tally.outcomes[Outcome.HUNG]

    @property
    def is_clean(self) -> bool:
        """No wrong token, no hang, no leak, nothing failed, everything back and stopped in order."""
        bad = (Outcome.FAILED, Outcome.WRONG, Outcome.HUNG)
        return not any(self.tally.outcomes[outcome] for outcome in bad) and not self.num_left_behind

    @property
    def num_left_behind(self) -> int:
        """Leaks, parts that did not come back, and what went wrong at the stop."""
        return len(self.leaks) + len(self.unhealed) + len(self.warnings)

    @property
    def kinds_not_done(self) -> tuple[FaultKind, ...]:
        """Kinds of fault that were tried, could have hit somebody, and have hit nobody."""
        done = {item.fault.kind for item in self.faults if item.is_done}
        return tuple(sorted({item.fault.kind for item in self.faults if item.is_possible} - done))

    @property
    def kinds_impossible(self) -> tuple[FaultKind, ...]:
        """Kinds that this machine or this fleet knows no way to do."""
        return tuple(sorted({item.fault.kind for item in self.faults if not item.is_possible}))

    @property
    def longest_gap_s(self) -> float:
        """From the start or a fault that was done to the next one, or to the end of the schedule; not beyond."""
        end_s = math.inf if self.ended_s is None else self.ended_s
        hits = sorted(item.at_s for item in self.faults if item.is_done and item.at_s < end_s)
        times = [self.started_s, *hits, *([] if self.ended_s is None else [end_s])]
        return max((later - earlier for earlier, later in zip(times, times[1:], strict=False)), default=0.0)

    def extended(self, leaks: Sequence[Leak], warnings: Sequence[str]) -> Report:
        """The same run, once the fleet has been stopped."""
        return replace(self, leaks=tuple(leaks), warnings=tuple(warnings))

    def to_json(self) -> str:
        """The whole of it."""
        document = {
            "options": self.options,
            "requests": self.tally.num_requests,
            **{outcome.value: self.tally.outcomes[outcome] for outcome in Outcome},
            "migrated": self.num_migrated,
            "asked_again": self.tally.num_asked_again,
            "failed_by_code": dict(self.tally.failed_by_code),
            "completed_share": self.tally.completed_share,
            "wrong_tokens": self.tally.num_wrong_tokens,
            "hangs": self.num_hangs,
            "leaks": [{"kind": leak.kind, "what": leak.what} for leak in self.leaks],
            "unhealed": list(self.unhealed),
            "warnings": list(self.warnings),
            "kinds_not_done": [kind.value for kind in self.kinds_not_done],
            "kinds_impossible": [kind.value for kind in self.kinds_impossible],
            "longest_gap_s": round(self.longest_gap_s, 3),
            "faults": [self._fault(done) for done in self.faults],
            "troubles": [self._trouble(answered) for answered in self.troubles],
        }
        return json.dumps(document, indent=1)

    def tables(self) -> list[Table]:
        """For a terminal: counts, faults, and what went wrong, if anything did."""
        counts = Table("requests", *(outcome.value for outcome in Outcome), "migrated", "asked again", "wrong tokens")
        counts.add_row(
            *map(str, (self.tally.num_requests, *(self.tally.outcomes[outcome] for outcome in Outcome))),
            *map(str, (self.num_migrated, self.tally.num_asked_again, self.tally.num_wrong_tokens)),
        )
        return [counts, self._fault_table(), *self._trouble_tables()]

    def _fault_table(self) -> Table:
        done = Counter(item.fault.name for item in self.faults if item.is_done)
        table = Table("fault", "done", "not done", "why not")
        for name in sorted({item.fault.name for item in self.faults}):
            missed = [item.note for item in self.faults if item.fault.name == name and not item.is_done]
            table.add_row(name, str(done[name]), str(len(missed)), escape(missed[0]) if missed else "")
        return table

    def _trouble_tables(self) -> list[Table]:
        tables = []
        if self.troubles:
            table = Table("at", "request", "outcome", "code", "text")
            for answered in self.troubles[:_SHOWN]:
                trouble = self._trouble(answered)
                table.add_row(*(escape(str(trouble[name])) for name in ("at_s", "request", "outcome", "code", "text")))
            tables.append(table)
        if self.leaks or self.unhealed:
            table = Table("left behind", "what", title=str(count_by_kind(self.leaks)) if self.leaks else None)
            for leak in self.leaks[:_SHOWN]:
                table.add_row(leak.kind, escape(leak.what))
            for name in self.unhealed:
                table.add_row("not back", name)
            tables.append(table)
        return tables

    def _fault(self, done: Done) -> dict[str, Any]:
        return {
            "at_s": round(done.at_s - self.started_s, 3),
            "fault": done.fault.name,
            "target": done.fault.target,
            "done": done.is_done,
            "note": done.note,
        }

    def _trouble(self, answered: Answered) -> dict[str, Any]:
        judgement = answered.judgement
        return {
            "at_s": round(answered.started_s - self.started_s, 2),
            "ended_s": round(answered.ended_s - self.started_s, 2),
            "request": answered.request_id,
            "expected": answered.question.expectation.value,
            "outcome": judgement.outcome.value,
            "code": judgement.code,
            "text": judgement.text[:_TEXT_CHARS],
        }
