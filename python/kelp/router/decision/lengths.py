"""How long answers are: learned from those that ended, since `max_tokens` is what clients allow, not what they get."""

from __future__ import annotations

import math

_PRIOR_TOKENS = 128.0
_MIN_GAIN = 0.005


class AnswerLengths:
    """Geometric mean of the output tokens of completed requests, the latest few hundred; belongs to one event loop.

    Attributes:
        usual: Tokens.
    """

    def __init__(self) -> None:
        self.usual = _PRIOR_TOKENS
        self._log = math.log(_PRIOR_TOKENS)
        self._num_observed = 0

    def observe(self, num_tokens: int) -> None:
        """A request completed with that many output tokens, at least one."""
        self._num_observed += 1
        self._log += max(_MIN_GAIN, 1.0 / (self._num_observed + 1)) * (math.log(num_tokens) - self._log)
        self.usual = math.exp(self._log)
