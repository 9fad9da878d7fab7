"""Configuration of how the processes behind models are started again; part of `core.config`."""

from __future__ import annotations

from kelp.core.config_values import Group, Positive


class SupervisionConfig(Group):
    """How `kelp serve` and `kelp supervise` deal with models whose process has died."""

    enabled: bool = True
    """Load them again; else they stay dead, and `kelp serve` only restarts whole servers."""
    look_s: Positive = 2.0
    """How often the server's models and processes are compared; the end of a known process is seen at once."""
    first_backoff_s: Positive = 1.0
    """The wait before something that died is started again; it doubles with each early death."""
    longest_backoff_s: Positive = 30.0
    """That wait grows no further."""
    healthy_after_s: Positive = 60.0
    """A death later than this after the start is not an early one: the wait begins anew."""
