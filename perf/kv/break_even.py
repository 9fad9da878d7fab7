"""From which length on bringing a prefix pays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SHORT_LENGTHS = (64, 128, 256)
"""Measured for this alone, in tokens: it pays from below the lengths that the issue names."""

BOUND = ", or "
"""In a unit, between that of a length and which way the true figure lies."""


@dataclass(frozen=True, slots=True)
class BreakEven:
    """The length from which on bringing is faster, as far as lengths were measured.

    Attributes:
        tokens: The length, or the one that it is certain to be not above, or not below.
        bound: "", or "below": bringing is faster at every length, or "above": not at the longest one.
    """

    tokens: float
    bound: str = ""

    def unit(self, name: str) -> str:
        """Unit of the figure, given that of a length."""
        return f"{name}{BOUND}{self.bound}" if self.bound else name


def break_even(bring: Mapping[int, float], compute: Mapping[int, float]) -> BreakEven:
    """Where the curves of what bringing and computing take cross for the last time.

    Both are linear between measured lengths, and nothing is said beyond them: neither is linear over all of them, as
    attention costs more per token the longer a prompt is.

    Args:
        bring: Seconds by number of tokens; at least one length.
        compute: The same for computing them, at the same lengths.
    """
    lengths = sorted(bring)
    gains = [compute[length] - bring[length] for length in lengths]
    if gains[-1] <= 0:
        return BreakEven(float(lengths[-1]), "above")
    for index in range(len(lengths) - 1, 0, -1):
        if gains[index - 1] <= 0:
            share = -gains[index - 1] / (gains[index] - gains[index - 1])
            return BreakEven(lengths[index - 1] + share * (lengths[index] - lengths[index - 1]))
    return BreakEven(float(lengths[0]), "below")
