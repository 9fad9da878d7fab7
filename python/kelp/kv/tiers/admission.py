"""Which blocks may wear an SSD: those asked for often enough, at no more than so many bytes per second.

Both are asked by the manager before a write. A block that is not admitted stays in the host tier and may come back.
"""

from __future__ import annotations

from collections import OrderedDict

from kelp.core.clock import Clock
from kelp.core.types import SequenceHash

_BURST_S = 1.0


class OfferFilter:
    """Admits a block when it has been offered `min_offers` times, as far as memory goes back.

    Args:
        max_known: Blocks whose offers are remembered; the one not offered for longest is forgotten.
    """

    def __init__(self, min_offers: int, max_known: int) -> None:
        self._min_offers = min_offers
        self._max_known = max_known
        self._offers: OrderedDict[SequenceHash, int] = OrderedDict()

    def admits(self, name: SequenceHash) -> bool:
        """Count an offer of a block; says whether it is to be written now."""
        if self._min_offers <= 1:
            return True
        offers = self._offers.pop(name, 0) + 1
        if offers >= self._min_offers:
            return True
        self._remember(name, offers)
        return False

    def restore(self, name: SequenceHash) -> None:
        """A block that was admitted was not written after all: it stays admitted."""
        if self._min_offers > 1:
            self._offers.pop(name, None)
            self._remember(name, self._min_offers)

    def has_admitted(self, name: SequenceHash) -> bool:
        """Whether a block could be written now without a further offer."""
        return self._min_offers <= 1 or self._offers.get(name, 0) >= self._min_offers

    def _remember(self, name: SequenceHash, offers: int) -> None:
        self._offers[name] = offers
        if len(self._offers) > self._max_known:
            self._offers.popitem(last=False)


class WriteBudget:
    """A token bucket of bytes: `max_bytes_per_s` on average, a second's worth at once.

    Args:
        max_bytes_per_s: 0 for no bound.
        min_burst_bytes: The bucket holds at least so much: one block, or nothing would ever pass.
    """

    def __init__(self, max_bytes_per_s: int, min_burst_bytes: int, clock: Clock) -> None:
        self._rate = max_bytes_per_s
        self._capacity = max(max_bytes_per_s * _BURST_S, float(min_burst_bytes))
        self._tokens = self._capacity
        self._clock = clock
        self._filled_s = clock.monotonic_s()

    def allows(self, num_bytes: int) -> bool:
        """Take `num_bytes` if they are there; True without a bound."""
        if self._rate == 0:
            return True
        now_s = self._clock.monotonic_s()
        self._tokens = min(self._capacity, self._tokens + (now_s - self._filled_s) * self._rate)
        self._filled_s = now_s
        if num_bytes > self._tokens:
            return False
        self._tokens -= num_bytes
        return True
