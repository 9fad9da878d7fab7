"""Configuration of how the processes of one deployment know each other; part of `core.config`."""

from __future__ import annotations

from pathlib import Path

from kelp.core.config_values import Group


class PeersConfig(Group):
    """What routers, workers and KV block managers ask of each other (docs/security.md)."""

    token_file: Path | None = None
    """File with the deployment's token: 16 bytes at least, the same everywhere, readable by its owner alone. `kelp
    serve` makes one per run; without one, whoever reaches a port is taken for a peer."""
    allow_foreign_events: bool = False
    """With a token: also follow KV events of engines that know none (vLLM, SGLang)."""
