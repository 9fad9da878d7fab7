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
    """

    fault: Fault
    at_s: float
    is_done: bool
    note: str


class Victimless(Exception):
    """There is nobody to do it to; the message says why."""
