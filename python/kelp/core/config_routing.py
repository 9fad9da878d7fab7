"""Configuration of the routing decision; part of `core.config`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kelp.core.config_values import Group, Positive

PolicyName = Literal["kelp", "dynamo", "sglang", "least-loaded", "round-robin", "random", "power-of-two"]
"""How the router chooses a worker; `router.decision.policies` describes each."""


class RoutingConfig(Group):
    """How the router weighs workers and what it remembers of its decisions."""

    policy_parameters: dict[str, float] = {}
    """Weights and thresholds of the chosen policy by field name; its module in `router.decision.policies` has the
    defaults."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Above 0, a worker is drawn with odds that fall with its cost (softmax over the range of costs)."""
    disaggregation_itl_weight: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Where `router.disaggregation` is `auto`: what a second that the answer takes longer after its first token is
    worth, in seconds of time to first token. 0 leaves it out: predictions so far ahead did not pay in simulations."""
    disaggregation_stall_weight: Annotated[float, Field(ge=0, le=1000)] = 0.5
    """There: what a second is worth by which a prompt stalls another answer of the worker that computes it."""
    reservation_ttl_s: Positive = 10.0
    """A reservation that is not committed for this long lapses."""
    lease_ttl_s: Positive = 600.0
    """A committed request without a sign of life for this long no longer counts as load."""
    session_affinity: Literal["off", "prefer", "stick"] = "prefer"
    """`prefer`: a session returns to its worker unless another one would answer much sooner; `stick`: always, if it is
    there."""
    session_ttl_s: Positive = 600.0
    """A session silent for this long is forgotten."""
    max_sessions: Annotated[int, Field(ge=1)] = 65536
    """Sessions remembered; the one that was silent for longest goes first."""
    preferred_tag_discount: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """By which share each matching preferred tag makes a worker cheaper."""
    index_max_bytes: Annotated[int, Field(ge=1 << 16)] = 1 << 30
    """Most memory of the prefix index; beyond, what no prompt has matched for longest is forgotten."""
    expected_ttl_s: Positive = 120.0
    """How long blocks of a placed request count as a worker's own while its events neither confirm nor deny them."""
    events_ttl_s: Positive = 30.0
    """A worker that does not answer for its KV events this long is known by predictions alone until it does again."""
    explained_bytes: Annotated[int, Field(ge=0)] = 32 * 1024 * 1024
    """Most memory of the decisions that `kelp_explain` can tell of (estimated); the oldest decisions go first."""
