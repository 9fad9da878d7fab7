"""What several commands share: options that mean the same everywhere, and how progress is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

GrpcPort = Annotated[int, typer.Option("--grpc-port", help="Triton's gRPC port of the running server.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with any field of the configuration schema.")
]


def sayer() -> Callable[[str], None]:
    """Prints lines with the seconds since now in front."""
    started_s = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started_s:6.1f} s] {line}", flush=True)

    return say
