"""What computing and asking take on this worker, as far as its own requests have shown."""

from __future__ import annotations

from kelp.executor.base import Completed

_WEIGHT = 0.2
_MIN_TOKENS = 64
"""Shorter prefills say more of a step's fixed cost than of a token's."""
_ASKING_SHARE = 2.0
"""A prompt that is computed in less than so many calls is not asked for."""


class Smoothed:
    """An exponentially weighted mean; None before the first value."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Count one more."""
        self.value = value if self.value is None else self.value + _WEIGHT * (value - self.value)


class Rates:
    """Seconds; belongs to one event loop."""

    def __init__(self) -> None:
        self._token_s = Smoothed()
        self._call_s = Smoothed()

    def note_call(self, seconds: float) -> None:
        """The manager has answered an `Onboard` after this long."""
        self._call_s.add(seconds)

    def note_prefill(self, num_prompt_tokens: int, completed: Completed) -> None:
        """A request has ended; one with onboarded blocks tells nothing, it waited for those."""
        timings, usage = completed.timings, completed.usage
        num_tokens = num_prompt_tokens - usage.cached_tokens
        seconds = (timings.prefill_done_ns - timings.first_scheduled_ns) / 1e9
        if num_tokens >= _MIN_TOKENS and timings.first_scheduled_ns and seconds > 0 and not usage.onboarded_blocks:
            self._token_s.add(seconds / num_tokens)

    def recompute_s(self, num_tokens: int) -> float | None:
        """Predicted time of a prefill; None if nothing is known."""
        return None if self._token_s.value is None else num_tokens * self._token_s.value

    def is_worth_asking(self, num_tokens: int) -> bool:
        """Whether computing takes so long that asking the manager can pay."""
        recompute_s = self.recompute_s(num_tokens)
        return recompute_s is None or self._call_s.value is None or recompute_s > _ASKING_SHARE * self._call_s.value
