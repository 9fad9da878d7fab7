"""What the parent tritonserver was started with.

Triton tells a Python model nothing about its server. The stub is the server's child, so the command line answers
where the server listens and whether models can be loaded at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil

_DEFAULT_GRPC_PORT = 8001


@dataclass(frozen=True, slots=True)
class ServerFlags:
    """The flags that matter to a model."""

    grpc_port: int
    is_explicit: bool


def parse_flags(arguments: list[str]) -> ServerFlags:
    """Read tritonserver arguments, both `--flag=value` and `--flag value`."""
    values: dict[str, str] = {}
    for index, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if name.startswith("--"):
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            values[name] = value if separator else following
    return ServerFlags(
        grpc_port=int(values.get("--grpc-port", _DEFAULT_GRPC_PORT)),
        is_explicit=values.get("--model-control-mode") == "explicit",
    )


def parent_flags() -> ServerFlags:
    """Flags of the tritonserver that started this stub; defaults where no parent is one."""
    for process in psutil.Process().parents():
        arguments = process.cmdline()
        if any(argument.endswith("tritonserver") for argument in arguments[:2]):
            return parse_flags(arguments)
    return ServerFlags(_DEFAULT_GRPC_PORT, False)
