"""One pass over all objects: what there is, how much it is, and which are the oldest. Bounded memory; pure."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from kelp.core.types import SequenceHash

_MAX_CANDIDATES = 8192
_QUOTA_SHARE = 0.95


@dataclass
class Sweep:
    """What a listing has given so far.

    Attributes:
        token: Where the listing goes on; empty at its start.
        usable: Of groups that this host can read, the last block and the tenant.
    """

    token: str = ""
    num_objects: int = 0
    num_bytes: int = 0
    usable: dict[SequenceHash, bytes] = field(default_factory=dict)
    _oldest: list[tuple[float, str, int]] = field(default_factory=list)

    def add(self, key: str, num_bytes: int, modified_s: float) -> None:
        """An object of kelp's, of whichever space."""
        self.num_objects += 1
        self.num_bytes += num_bytes
        candidate = (-modified_s, key, num_bytes)
        if len(self._oldest) < _MAX_CANDIDATES:
            heapq.heappush(self._oldest, candidate)
        elif candidate > self._oldest[0]:
            heapq.heapreplace(self._oldest, candidate)

    def surplus(self, max_bytes: int) -> list[str]:
        """Keys of the oldest objects whose removal leaves a little less than `max_bytes` (0: no bound).

        A pass removes a bounded number of objects; the next one goes on.
        """
        if not max_bytes or self.num_bytes <= max_bytes:
            return []
        remaining, keys = self.num_bytes, []
        for _, key, num_bytes in sorted(self._oldest, reverse=True):
            if remaining <= _QUOTA_SHARE * max_bytes:
                break
            remaining -= num_bytes
            keys.append(key)
        return keys
