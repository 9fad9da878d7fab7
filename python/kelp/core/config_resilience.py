"""Configuration of how workers leave and of how they notice that they do not get on; part of `core.config`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kelp.core.config_values import Group, Positive


class DrainConfig(Group):
    """What becomes of the requests of a worker that is drained, or of a `kelp serve` that is to stop."""

    grace_s: Annotated[float, Field(ge=0)] = 30.0
    """Requests that still run on a draining worker after this long go on at another one; those of a `kelp serve` that
    got SIGTERM end with an error. With 0, it stops at once."""


class WatchdogConfig(Group):
    """When a worker that still answers counts as stuck."""

    step_timeout_s: Positive = 60.0
    """A step of the engine that takes longer makes the worker `stuck`: it gives its requests up and gets no new ones
    until the step has ended."""
    end_after_s: Annotated[float, Field(ge=0)] = 300.0
    """A worker that stays stuck for this long, or at once if its engine's thread has died or fails at every step, ends
    its own process, for supervision to start it anew; 0 for never."""
