"""What several commands share: options that mean the same everywhere, and how progress is told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kelp.core.config import KelpConfig, load_config
from kelp.core.errors import ConfigError

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


def effective_config(
    config_file: Path | None, options: dict[str, str | None], adapters: list[str], settings: list[str]
) -> KelpConfig:
    """Defaults, then the file, then options and settings (`group.field=value`).

    Args:
        config_file: See `ConfigFile`.
        options: Values by field; None for options that were not given.
        adapters: `name=folder` each.
        settings: `group.field=value` each.

    Raises:
        ConfigError: Names the option or the field.
    """
    parameters = {key: value for key, value in options.items() if value is not None}
    if adapters:
        parameters["model.lora_adapters"] = json.dumps(_adapter_folders(adapters))
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise ConfigError(f"--set {setting!r}: must be key=value, for example executor.block_size=32")
        parameters[key] = value
    return load_config(parameters, config_file)


def _adapter_folders(adapters: list[str]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for adapter in adapters:
        name, _, folder = adapter.partition("=")
        if not folder:
            raise ConfigError(f"--lora {adapter!r}: must be name=folder, for example sql=/adapters/sql")
        if name in folders:
            raise ConfigError(f"--lora {adapter!r}: there is another adapter of that name")
        folders[name] = str(Path(folder).resolve())
    return folders
