"""`kelp traffic`: shares of the requests for versions of a model that serve side by side."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Annotated

import typer

from kelp.cli.options import GrpcPort
from kelp.core.config import load_config
from kelp.core.errors import ConfigError
from kelp.core.peer_auth import load_token
from kelp.registry.access import open_registry
from kelp.supervisor import run_state
from kelp.supervisor.traffic import Traffic, VersionTraffic


def traffic(
    shares: Annotated[
        list[str] | None, typer.Argument(help="version=share, for example base=90 v2=10; others get nothing.")
    ] = None,
    is_back: Annotated[bool, typer.Option("--back", help="Undo the last change.")] = False,
    grpc_port: GrpcPort = 8001,
    as_json: Annotated[bool, typer.Option("--json", help="Show it as JSON.")] = False,
) -> None:
    """Show, or set, what share of the requests each version of the model gets.

    Versions are started with `kelp scale --version`. Requests under way stay where they are; those of one session stay
    with one version while the shares do. Nothing set: every router serves the version that it was started with.
    """
    if shares and is_back:
        raise ConfigError("kelp traffic: give either shares or --back")
    run = run_state.read_state(grpc_port)
    config = load_config(path=None if run is None else run.run_folder / "kelp.yaml")
    among = Traffic(open_registry(config.registry, load_token(config.peers)), config.model.version)
    if is_back:
        among.back()
    elif shares:
        among.set(parse_shares(shares))
    versions = among.versions()
    print(json.dumps([asdict(version) for version in versions], indent=2) if as_json else report(versions))


def parse_shares(texts: list[str]) -> dict[str, float]:
    """`version=share` each; any non-negative numbers, relative to each other.

    Raises:
        ConfigError: One is not of that form, or a version is named twice.
    """
    shares: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not name or not 0 <= share <= 1e6 or name in shares:
            raise ConfigError(f"{text!r}: must be version=share, each version once, for example base=90 v2=10")
        shares[name] = share
    return shares


def report(versions: list[VersionTraffic]) -> str:
    """A line for each version."""
    lines = []
    for version in versions:
        share = "its own" if version.share is None else f"{version.share:.1%}"
        ready = ", ".join(f"{count} {role}" for role, count in sorted(version.num_ready.items())) or "none"
        models = ", ".join(model_id[:12] for model_id in version.model_ids) or "none"
        lines.append(
            f"{version.version:16} {share:>8}   ready: {ready} (of {version.num_workers} workers)   model {models}"
        )
    return "\n".join(lines) or "no workers"
