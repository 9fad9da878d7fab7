"""What a simulated worker is made of, what it counts, and who hears of its requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kelp.executor.batching.scheduler import SchedulerLimits
from kelp.sim.agenda import Agenda
from kelp.sim.sequence import SimSequence
from kelp.sim.truth import NoiseTable, TrueSpeed
from kelp.timing.model import TimingModel


class RequestSink(Protocol):
    """Hears what happens to sequences, at the moment when it does."""

    def on_reserved(self, sequence: SimSequence) -> None:
        """An import has its blocks: its KV may come."""

    def on_first_token(self, sequence: SimSequence) -> None:
        """The prompt has been computed, here."""

    def on_tokens(self, sequence: SimSequence, num_tokens: int) -> None:
        """That many more tokens after the first; not told of the last ones."""

    def on_ended(self, sequence: SimSequence) -> None:
        """The last token has come; a prefill's blocks stay held until `release_export`."""


@dataclass(slots=True)
class Totals:
    """What a worker has done so far; `result.FleetTable` describes the fields."""

    busy_s: float = 0.0
    num_steps: int = 0
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker is made of.

    Attributes:
        may_skip: Whether steps may be taken at once.
    """

    agenda: Agenda
    timing: TimingModel
    speed: TrueSpeed
    noise: NoiseTable
    num_blocks: int
    limits: SchedulerLimits
    may_skip: bool = True


class NoDrafts:
    """Nothing to speculate about where there are no tokens."""

    may_draft = False

    def num_worthwhile(self, sequence: SimSequence, num_decodes: int) -> int:
        """None."""
        return 0

    def draft(self, sequences: object, limits: object) -> list[int]:
        """Never asked for."""
        raise AssertionError("no drafts were promised")
