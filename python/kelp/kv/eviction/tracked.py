"""What the `cost` policy knows of a block, and the blocks that it takes for alike."""

from __future__ import annotations

from kelp.core.types import SequenceHash
from kelp.kv.eviction.leaves import LeafGroup


class Cohort:
    """Blocks of one class that were last used in one epoch.

    Attributes:
        kind: Class of its blocks.
        epoch: Of their last use.
        num_alive: Blocks, ghosts included, that have not been used since.
        ghosts: Those of them that have left the tier.
        groups: By step of cost.
    """

    __slots__ = ("epoch", "ghosts", "groups", "kind", "num_alive")

    def __init__(self, kind: int, epoch: int) -> None:
        self.kind = kind
        self.epoch = epoch
        self.num_alive = 0
        self.ghosts: dict[SequenceHash, None] = {}
        self.groups: dict[int, LeafGroup] = {}


class Tracked:
    """One block, in the tier or remembered.

    Attributes:
        cohort: Set by `Cohorts.enter`.
        cost_step: Logarithm of what computing it takes.
        num_uses: After it first came, while it was remembered.
        num_children: Resident blocks that follow it.
        parent: Counts this block as its child; None while this block is not resident.
    """

    __slots__ = ("cohort", "cost_step", "is_resident", "name", "num_children", "num_uses", "parent")

    cohort: Cohort

    def __init__(self, name: SequenceHash, cost_step: int) -> None:
        self.name = name
        self.cost_step = cost_step
        self.is_resident = True
        self.num_children = 0
        self.num_uses = 0
        self.parent: Tracked | None = None

    @property
    def is_leaf(self) -> bool:
        """Whether it may go without making another block useless."""
        return self.is_resident and not self.num_children
