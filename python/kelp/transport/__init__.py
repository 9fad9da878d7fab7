"""Moving bytes between registered memory of different processes."""

from __future__ import annotations

from typing import Literal

from kelp.transport.base import Agent


def open_agent(kind: Literal["nixl", "local"], name: str) -> Agent:
    """Make the agent that a configuration names; may take a second and touches the accelerator.

    Raises:
        ConfigError: The transport's wheel is missing or its backend does not start.
    """
    if kind == "local":
        from kelp.transport.local import LocalAgent

        return LocalAgent(name)
    from kelp.transport.nixl import NixlAgent

    return NixlAgent(name)
