"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kelp.core.errors import ConfigError
from kelp.router.decision.policies.base import CostPolicy
from kelp.router.decision.policies.counting import LeastLoadedPolicy, PowerOfTwoPolicy, RandomPolicy, RoundRobinPolicy
from kelp.router.decision.policies.dynamo import DynamoPolicy
from kelp.router.decision.policies.kelp import KelpPolicy
from kelp.router.decision.policies.sglang import SGLangPolicy

POLICIES: dict[str, Callable[..., CostPolicy]] = {
    "kelp": KelpPolicy,
    "dynamo": DynamoPolicy,
    "sglang": SGLangPolicy,
    "least-loaded": LeastLoadedPolicy,
    "round-robin": RoundRobinPolicy,
    "random": RandomPolicy,
    "power-of-two": PowerOfTwoPolicy,
}
"""Makers by the names of `router.policy`."""


def new_policy(name: str, parameters: Mapping[str, float], temperature: float = 0.0) -> CostPolicy:
    """A policy of that name.

    Args:
        name: One of `POLICIES`.
        parameters: Values of the policy's fields that shall differ from its defaults.
        temperature: For policies that have one.

    Raises:
        ConfigError: No such policy, or it has no such field.
    """
    make: Any = POLICIES.get(name)
    if make is None:
        raise ConfigError(f"router.policy: {name!r} is none of {', '.join(POLICIES)}")
    known = tuple(getattr(make, "__dataclass_fields__", ()))
    for field in parameters:
        if field not in known:
            raise ConfigError(
                f"routing.policy_parameters: {name} has no {field!r}, only {', '.join(known) or 'nothing'}"
            )
    softness = {"temperature": temperature} if temperature > 0.0 and "temperature" in known else {}
    policy: CostPolicy = make(**{**softness, **parameters})
    return policy
