"""How long exported blocks stay as they are: one promise, seen from both of its ends.

`Lease` lives with the blocks. `LeaseValidity` lives with the reader and is always the more careful of the two:
it counts from the moment a heartbeat was *sent*, the lease from the moment it *arrived*, so the reader stops
trusting what it READs before the owner may reuse a block, whatever the network does and without comparing clocks
of two machines. Knows nothing of streams and transfers.
"""

from __future__ import annotations

from collections.abc import Callable

from kelp.core.clock import Clock

_CLOCK_DRIFT = 0.01
"""Two machines' monotonic clocks are assumed to run at rates that differ by less than this."""


class Lease:
    """Blocks that a reader may rely on.

    It never expires while the prefill runs and nobody has attached. From the first of attach and finish on, it
    expires `ttl_s` after the last attach, heartbeat or finish. `on_release` is called exactly once.
    """

    def __init__(self, ttl_s: float, clock: Clock, on_release: Callable[[], None]) -> None:
        self.ttl_s = ttl_s
        self._clock = clock
        self._on_release = on_release
        self._expires_at_s: float | None = None
        self._is_live = True

    @property
    def is_live(self) -> bool:
        """Whether the blocks are still held."""
        return self._is_live

    def renew(self) -> bool:
        """Count the ttl from now; False, and released, if it had run out before."""
        if not self.expire():
            self._expires_at_s = self._clock.monotonic_s() + self.ttl_s
        return self._is_live

    def expire(self) -> bool:
        """Release if the ttl has run out; whether the lease has ended, now or earlier."""
        if self._expires_at_s is not None and self._clock.monotonic_s() >= self._expires_at_s:
            self.release()
        return not self._is_live

    def release(self) -> None:
        """Give the blocks back; idempotent."""
        if self._is_live:
            self._is_live = False
            self._on_release()


class LeaseValidity:
    """What the reader knows about the lease."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sent_at_s: dict[int, float] = {}
        self._next_number = 0
        self._valid_until_s: float | None = None

    @property
    def valid_until_s(self) -> float | None:
        """Monotonic time until which announced blocks hold their KV; None before the first answer."""
        return self._valid_until_s

    def next_heartbeat(self) -> int:
        """Number of the heartbeat that is sent right after this call; attaching is number 0."""
        number = self._next_number
        self._next_number += 1
        self._sent_at_s[number] = self._clock.monotonic_s()
        return number

    def answered(self, number: int, ttl_s: float) -> bool:
        """Take the answer to heartbeat `number`, or to all up to it; False if none of these was outstanding."""
        sent_at_s = self._sent_at_s.get(number)
        if sent_at_s is None:
            return False
        self._sent_at_s = {later: at for later, at in self._sent_at_s.items() if later > number}
        self._valid_until_s = sent_at_s + ttl_s * (1 - _CLOCK_DRIFT)
        return True

    def covers(self, time_s: float) -> bool:
        """Whether what was READ by `time_s` can be trusted."""
        return self._valid_until_s is not None and time_s <= self._valid_until_s
