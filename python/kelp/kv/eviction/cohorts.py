"""The books of the `cost` policy: blocks, also some that have left, by when they were last used.

A cohort is what was last used in one epoch and is alike in how often it was used. All of it has one age, so learning
how long blocks live, and valuing them anew every epoch, costs next to nothing per block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from kelp.core.types import SequenceHash
from kelp.kv.eviction.hazards import ReuseRates
from kelp.kv.eviction.leaves import LeafGroup
from kelp.kv.eviction.tracked import Cohort, Tracked

_NUM_KINDS = 6
"""Never used again, once, ..., five times or more."""
_COST_STEP = math.log(1.25)
"""Costs that differ by less than this factor count as equal."""
_LEAST_COST = 1e-12


class Cohorts:
    """All cohorts, and what they teach.

    Args:
        max_age: Epochs after which blocks are alike, and ghosts forgotten.
        max_ghosts: More are forgotten, those first that were last used longest ago.
        prior: See `ReuseRates`.
    """

    def __init__(self, max_age: int, max_ghosts: int, prior: float) -> None:
        self._max_age = max_age
        self._max_ghosts = max_ghosts
        self._rates = ReuseRates(_NUM_KINDS, max_age, prior)
        self._epoch = 0
        self._num_ghosts = 0
        # In order of age.
        self._cohorts: dict[tuple[int, int], Cohort] = {}

    def enter(self, tracked: Tracked) -> None:
        """It was used now."""
        key = min(tracked.num_uses, _NUM_KINDS - 1), self._epoch
        cohort = self._cohorts.get(key)
        if cohort is None:
            cohort = self._cohorts[key] = Cohort(*key)
        cohort.num_alive += 1
        tracked.cohort = cohort

    def leave(self, tracked: Tracked) -> None:
        """It is wanted again; `enter` follows."""
        cohort = tracked.cohort
        if not tracked.is_resident:
            del cohort.ghosts[tracked.name]
            self._num_ghosts -= 1
        cohort.num_alive -= 1
        self._rates.note_wanted(cohort.kind, self._epoch - cohort.epoch)
        tracked.num_uses += 1

    def evict(self, tracked: Tracked) -> None:
        """It has left the tier, and is remembered."""
        tracked.is_resident = False
        tracked.cohort.ghosts[tracked.name] = None
        self._num_ghosts += 1

    def group(self, tracked: Tracked) -> LeafGroup:
        """Where it belongs if it is a leaf."""
        cohort, step = tracked.cohort, tracked.cost_step
        group = cohort.groups.get(step)
        if group is None:
            cost = math.exp(step * _COST_STEP)
            group = cohort.groups[step] = LeafGroup(cost, cost * self._worth(cohort))
        return group

    def end_epoch(self) -> list[SequenceHash]:
        """Learn from what an epoch brought and value all groups anew; gives the blocks that are forgotten."""
        forgotten = list(self._forget_ghosts())
        self._cohorts = {key: cohort for key, cohort in self._cohorts.items() if cohort.num_alive}
        for cohort in self._cohorts.values():
            age = self._epoch - cohort.epoch
            if age < self._max_age:
                self._rates.note_passed(cohort.kind, age, cohort.num_alive)
        self._epoch += 1
        self._rates.learn()
        for cohort in self._cohorts.values():
            worth = self._worth(cohort)
            for group in cohort.groups.values():
                group.value = group.cost * worth
        return forgotten

    def groups(self) -> Iterator[LeafGroup]:
        """All groups, in order of age."""
        return (group for cohort in self._cohorts.values() for group in cohort.groups.values())

    def _worth(self, cohort: Cohort) -> float:
        return self._rates.worth(cohort.kind, self._epoch - cohort.epoch)

    def _forget_ghosts(self) -> Iterator[SequenceHash]:
        for cohort in self._cohorts.values():
            if self._epoch - cohort.epoch < self._max_age and self._num_ghosts <= self._max_ghosts:
                return
            yield from cohort.ghosts
            cohort.num_alive -= len(cohort.ghosts)
            self._num_ghosts -= len(cohort.ghosts)
            cohort.ghosts.clear()


def cost_step(cost: float) -> int:
    """What computing a block takes, as `Tracked` has it."""
    return math.floor(math.log(max(cost, _LEAST_COST)) / _COST_STEP)
