"""What computing and asking take on this worker, as far as its own requests have shown."""

from __future__ import annotations

from typing import NamedTuple

from kelp.executor.base import Completed

_WEIGHT = 0.2
_FIT_WEIGHT = 0.05
_MIN_TOKENS = 64
"""Shorter prefills say more of a step's fixed cost than of a token's."""
_ASKING_SHARE = 2.0
"""A prompt that is computed in less than so many calls is not asked for."""
_FADING = 0.99
"""Of the time of a call, whenever it keeps a prompt from being asked for: no new call would show that it is over."""
_NUM_TRUSTED = 4
_MAX_SURPRISE = 3.0
_DOUBT = 0.01
"""Contexts whose relative variance is less than this say little about how a token's time grows with them."""


class Smoothed:
    """An exponentially weighted mean; None before the first value."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Count one more."""
        self.value = value if self.value is None else self.value + _WEIGHT * (value - self.value)


class Prefill(NamedTuple):
    """Predicted time of a prefill.

    Attributes:
        quadratic_share: Of it, what grows with the square of the number of tokens.
    """

    seconds: float
    quadratic_share: float


class PrefillFit:
    """Seconds of a prompt's token: a constant, and what grows with the tokens before it (attention); neither negative.

    Exponentially weighted least squares on means over prompts, so that a long one counts no more than a short one.
    """

    def __init__(self) -> None:
        self._num_observed = 0
        self._context = self._token_s = self._context_variance = self._covariance = 0.0

    @property
    def is_measured(self) -> bool:
        """Whether it can predict."""
        return self._num_observed > 0

    def predict(self, num_tokens: int, num_before: int) -> Prefill:
        """Computing so many tokens behind so many others."""
        base_s, slope_s = self._coefficients()
        linear_s = num_tokens * (base_s + slope_s * num_before)
        quadratic_s = num_tokens * slope_s * num_tokens / 2
        seconds = linear_s + quadratic_s
        return Prefill(seconds, quadratic_s / seconds if seconds > 0 else 0.0)

    def observe(self, num_tokens: int, num_before: int, seconds: float) -> None:
        """That took so long; beyond the first few, surprises count at most threefold."""
        if self._num_observed >= _NUM_TRUSTED:
            expected_s = self.predict(num_tokens, num_before).seconds
            seconds = min(max(seconds, expected_s / _MAX_SURPRISE), expected_s * _MAX_SURPRISE)
        self._num_observed += 1
        gain = max(_FIT_WEIGHT, 1 / self._num_observed)
        context_error = num_before + num_tokens / 2 - self._context
        time_error = seconds / num_tokens - self._token_s
        self._context += gain * context_error
        self._token_s += gain * time_error
        self._context_variance = (1 - gain) * (self._context_variance + gain * context_error**2)
        self._covariance = (1 - gain) * (self._covariance + gain * context_error * time_error)

    def _coefficients(self) -> tuple[float, float]:
        slope_s = self._covariance / (self._context_variance + _DOUBT * self._context**2) if self._context else 0.0
        slope_s = min(max(slope_s, 0.0), self._token_s / self._context if self._context else 0.0)
        return self._token_s - slope_s * self._context, slope_s


class Rates:
    """Seconds; belongs to one event loop."""

    def __init__(self) -> None:
        self._prefill = PrefillFit()
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
            self._prefill.observe(num_tokens, usage.cached_tokens, seconds)

    def recompute(self, num_tokens: int, num_before: int = 0) -> Prefill | None:
        """Predicted time of a prefill behind so many tokens; None if nothing is known."""
        return self._prefill.predict(num_tokens, num_before) if self._prefill.is_measured else None

    def is_worth_asking(self, num_tokens: int, num_before: int = 0) -> bool:
        """Whether computing takes so long that asking the manager can pay; each no makes the next less certain."""
        recompute = self.recompute(num_tokens, num_before)
        if recompute is None or self._call_s.value is None or recompute.seconds > _ASKING_SHARE * self._call_s.value:
            return True
        self._call_s.value *= _FADING
        return False
