"""What became of a fault."""

from __future__ import annotations

from dataclasses import dataclass

from kelp.chaos.faults import Fault


@dataclass(frozen=True, slots=True)
class Done:
    """A fault as it was done.

    Attributes:
        at_s: `time.monotonic()`.
        note: Who was hit, or why nobody was.
        is_possible: False: there can be no victim, as this machine or fleet lacks what it takes.
    """

    fault: Fault
    at_s: float
    is_done: bool
    note: str
    is_possible: bool = True


class Victimless(Exception):
    """There is nobody to do it to; the message says why."""


class Impossible(Victimless):
    """There will never be anybody: this machine or this fleet lacks what it takes."""
