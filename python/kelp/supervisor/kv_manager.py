"""Where the KV block manager of a run has its host tier, and that nothing of it is left at the end."""

from __future__ import annotations

import contextlib
from pathlib import Path

from kelp.core.config import KelpConfig
from kelp.core.config_kv import default_arena_folder
from kelp.kv.tiers.clears import JOURNAL_NAME
from kelp.supervisor import run_state

_RUN_FOLDER = "serve-"


def arena_folder_of(grpc_port: int) -> Path:
    """Where the manager of the run behind a public gRPC port has its host tier, unless it is configured."""
    return default_arena_folder() / f"{_RUN_FOLDER}{grpc_port}"


def remove_arenas(config: KelpConfig) -> None:
    """Remove what a killed manager of this run left, and those of runs that are dead."""
    folders = default_arena_folder().glob(f"{_RUN_FOLDER}*")
    for folder in folders:
        port = folder.name.removeprefix(_RUN_FOLDER)
        is_own = folder == config.kv_manager.arena_folder
        if is_own or (port.isdigit() and run_state.read_state(int(port)) is None):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Keeps what is still to be cleared from an object store: the next run at this port goes on with it."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if not path.name.startswith(JOURNAL_NAME):
                path.unlink(missing_ok=True)
        folder.rmdir()
