"""`kelp doctor` and `version`: what is installed, what is configured, what is missing."""

from __future__ import annotations

import typer
import yaml

from kelp import __version__
from kelp.cli.options import ConfigFile
from kelp.core.config import load_config
from kelp.supervisor import doctor


def doctor_command(config: ConfigFile = None) -> None:
    """Print the effective configuration and what is missing on this machine."""
    print(yaml.safe_dump(load_config(path=config).model_dump(mode="json"), sort_keys=False))
    is_fine = True
    for finding in doctor.examine(config):
        print(f"{'ok  ' if finding.is_fine else 'LACK'}  {finding.subject}: {finding.detail}")
        is_fine = is_fine and finding.is_fine
    raise typer.Exit(0 if is_fine else 1)


def version() -> None:
    """Print kelp's version."""
    print(__version__)
