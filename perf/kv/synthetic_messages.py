"""What the suite and the synthetic process say to each other."""

from __future__ import annotations

import json
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SyntheticSpec:
    """What to measure; without `bucket` no object store."""

    lengths: tuple[int, ...]
    num_rounds: int
    endpoint: str = ""
    bucket: str = ""

    @classmethod
    def from_json(cls, document: str) -> SyntheticSpec:
        """Inverse of `json.dumps(asdict(spec))`."""
        fields = json.loads(document)
        return cls(**{**fields, "lengths": tuple(fields["lengths"])})


@dataclass(slots=True)
class SyntheticResult:
    """What was measured.

    Attributes:
        onboard: Seconds by tier (`g2`) and length in tokens, as text.
        g2_read: GB/s of onboarding from the host tier, and of numpy copying as much; `g2_write`: of storing.
        trouble: Why it ended early; empty otherwise.
    """

    onboard: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    g2_read: list[tuple[float, float]] = field(default_factory=list)
    g2_write: list[tuple[float, float]] = field(default_factory=list)
    trouble: str = ""

    def add(self, tier: str, length: int, seconds: float) -> None:
        """Note one onboarding."""
        self.onboard.setdefault(tier, {}).setdefault(str(length), []).append(seconds)

    @classmethod
    def from_json(cls, document: str) -> SyntheticResult:
        """Inverse of `json.dumps(asdict(result))`."""
        return cls(**json.loads(document))
