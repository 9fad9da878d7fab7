"""Whether learned values are worth following: what there is to win, estimated while another order decides.

Of the blocks wanted again, a share *m* had left. If the victims that the learned values would have chosen are worth
*r* times as much as those that left, about *r m* would have been missed instead, and hits would grow by
`m (1 - r) / (1 - m)`. The estimate comes from the very values that want to be followed, so it has to be clearly above
nothing; and changing the order costs hits at first, so it isn't changed back before little is missed at all.
"""

from __future__ import annotations

_LEAST_GAIN = 0.18
"""Growth of hits from which on learned values are followed. Where it stayed below 0.14 following them lost up to 1 % on
the tuning halves of the workloads, where it came to 0.2 it won 4 % and more (docs/kv-eviction.md)."""
_LEAST_MISSED = 0.1
"""Missed share below which they are followed no longer: the tier has become large for what it is used for."""
_DECAY = 0.97
"""Of everything per epoch; as in `hazards`."""


class Prospect:
    """Counts what happens, and decides when an epoch ends."""

    def __init__(self) -> None:
        self._num_found = self._num_missed = 0.0
        self._left_value = self._least_value = 0.0
        self._is_followed = False

    @property
    def is_followed(self) -> bool:
        """Whether the learned values decide who leaves."""
        return self._is_followed

    def note_found(self) -> None:
        """A block was wanted and there."""
        self._num_found += 1

    def note_missed(self) -> None:
        """A block was wanted that had left."""
        self._num_missed += 1

    def note_victim(self, value: float, least_value: float) -> None:
        """A block of this value is to leave, where the learned values would have chosen one of `least_value`."""
        self._left_value += value
        self._least_value += least_value

    def end_epoch(self) -> None:
        """Decide, and let the past count less."""
        num_wanted = self._num_found + self._num_missed
        if self._is_followed:
            self._is_followed = self._num_missed > _LEAST_MISSED * num_wanted
        else:
            self._is_followed = self._gain() > _LEAST_GAIN
        self._num_found *= _DECAY
        self._num_missed *= _DECAY
        self._left_value *= _DECAY
        self._least_value *= _DECAY

    def _gain(self) -> float:
        if not self._num_found or not self._left_value:
            # Nothing found in spite of misses: there is everything to win.
            return self._num_missed
        return self._num_missed / self._num_found * (1 - self._least_value / self._left_value)
