"""Policies as a run names them: `dynamo`, or `dynamo,temperature=0.5,overlap_credit=0.8`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from kelp.core.config import PolicyName
from kelp.core.errors import ConfigError
from kelp.router.decision.policies.catalogue import new_policy

ALL_POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


@dataclass(frozen=True, slots=True)
class Contestant:
    """A policy with some of its fields set.

    Attributes:
        policy: As `router.policy` has it.
        parameters: As `routing.policy_parameters` has them; what is not named keeps its default.
    """

    policy: PolicyName
    parameters: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The text that `parse_contestant` reads."""
        return ",".join([self.policy, *(f"{name}={value:g}" for name, value in self.parameters.items())])


def parse_contestant(text: str) -> Contestant:
    """Read `policy[,field=value...]`.

    Raises:
        ConfigError: Unknown policy or field, or a value that is no number; names them.
    """
    name, *settings = (part.strip() for part in text.split(","))
    policy = next((known for known in ALL_POLICIES if known == name), None)
    if policy is None:
        raise ConfigError(f"--policy {text!r}: {name!r} is none of {', '.join(ALL_POLICIES)}")
    parameters: dict[str, float] = {}
    for setting in settings:
        field_name, separator, value = setting.partition("=")
        try:
            parameters[field_name] = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise ConfigError(f"--policy {text!r}: {setting!r} must be field=number")
    new_policy(policy, parameters)
    return Contestant(policy, parameters)
