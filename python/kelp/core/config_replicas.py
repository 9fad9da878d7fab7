"""Configuration of the router's queue, of routers side by side and of their way to workers; part of `core.config`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kelp.core.config_values import Group, Positive


class QueueConfig(Group):
    """The router's own queue, where requests wait while every worker that could take them is full."""

    max_waiting: Annotated[int, Field(ge=0)] = 1024
    """Requests that may wait; further ones are refused with KELP_OVERLOADED. 0 sends everything to workers at once."""
    ageing_s: Positive = 10.0
    """A request that has waited this long gets every second place, whatever the others' priority and slack."""
    refuse_late: bool = True
    """Refuse a request at once if its answer is predicted to miss its deadline, though a worker would take it."""
    ttft_target_s: Annotated[float, Field(ge=0)] = 0.0
    """Refuse a request, before any work, whose first token is predicted to come later than this after it came (wait and
    prefill); 0 for no target: only deadlines count."""
    running_factor: Annotated[float, Field(gt=0)] = 1.0
    """A worker is full with this many requests per sequence that it runs at once (its `max_running`)."""
    kv_factor: Annotated[float, Field(gt=0)] = 2.0
    """A worker is full when its requests hold this many times its KV blocks; blocks that they share count for each."""
    prefill_window_s: Positive = 30.0
    """A worker is full when the prompts that wait there are predicted to take this long."""


class ReplicasConfig(Group):
    """How the routers of the same workers tell each other what they have under way."""

    host: str = "127.0.0.1"
    """Address that a router's sockets bind and announce; whoever reaches them can read and ask."""
    heartbeat_s: Positive = 0.5
    """A router speaks at least this often, and looks for others."""
    publish_s: Positive = 0.005
    """News waits this long for company in one message."""
    lease_s: Positive = 30.0
    """Another router's request counts this long without being renewed."""
    stale_s: Positive = 3.0
    """What another router has is not trusted once it has been silent, or messages were missing, for this long."""


class DirectConfig(Group):
    """The direct way between a router and a worker, past Triton (docs/decisions/0010)."""

    enabled: bool = True
    """Workers listen at a free port of `handoff.host`, and routers use it; else all goes through Triton's gRPC."""
    stall_timeout_s: Positive = 10.0
    """A router that reads nothing of what a worker has for it for this long is disconnected, its requests end."""
