"""When something that has died is started again: soon at first, later with each early death."""

from __future__ import annotations

from kelp.core.config_supervision import SupervisionConfig


class Backoff:
    """The restart history of one thing; times are seconds of any one clock.

    Args:
        started_s: When it was started, as far as is known.
    """

    def __init__(self, rules: SupervisionConfig, started_s: float) -> None:
        self._rules = rules
        self._started_s = started_s
        self._wait_s = rules.first_backoff_s
        self._due_s: float | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether it is dead and its restart has been put off."""
        return self._due_s is not None

    def died(self, now_s: float) -> float:
        """Put the restart off; returns by how much."""
        if now_s - self._started_s > self._rules.healthy_after_s:
            self._wait_s = self._rules.first_backoff_s
        wait_s = self._wait_s
        self._wait_s = min(2 * wait_s, self._rules.longest_backoff_s)
        self._due_s = now_s + wait_s
        return wait_s

    def is_due(self, now_s: float) -> bool:
        """Whether to start it now."""
        return self._due_s is not None and now_s >= self._due_s

    def started(self, now_s: float) -> None:
        """It is being started."""
        self._due_s = None
        self._started_s = now_s
