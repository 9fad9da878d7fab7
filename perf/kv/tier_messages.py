"""What the suite and the tier process say to each other."""

from __future__ import annotations

import json
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TierSpec:
    """What to measure.

    Attributes:
        block_bytes: Of one block; a multiple of a page.
        num_blocks: Moved in one sample of the disk tier.
        group_blocks: Blocks per object.
        num_groups: Objects moved in one sample of the object tier.
        bucket: Empty: no object store.
        disk_folder: Where the slot files shall lie; empty: where temporary files do.
    """

    block_bytes: int
    num_blocks: int
    group_blocks: int
    num_groups: int
    num_rounds: int
    endpoint: str = ""
    bucket: str = ""
    disk_folder: str = ""


@dataclass(slots=True)
class TierRates:
    """GB/s by case (`g3_read`) and contestant (`tier` or a limit), one per round; troubles by case."""

    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)

    def add(self, case: str, contestant: str, gb_per_s: float) -> None:
        """Note one sample."""
        self.rates.setdefault(case, {}).setdefault(contestant, []).append(gb_per_s)

    @classmethod
    def from_json(cls, document: str) -> TierRates:
        """Inverse of `json.dumps(asdict(rates))`."""
        return cls(**json.loads(document))
