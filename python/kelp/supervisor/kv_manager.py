"""The KV block manager of a run: loaded again when its process has died, and nothing of it left at the end.

Triton neither restarts the process of a dead model nor says that it is dead; its record in the registry tells.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kelp.client.grpc import TritonControl
from kelp.core.config import KelpConfig
from kelp.core.config_kv import default_arena_folder
from kelp.core.errors import KelpError
from kelp.core.schema import KV_BLOCK_MANAGER
from kelp.registry.directory import KvManagerDirectory
from kelp.supervisor import run_state
from kelp.supervisor.plan import kv_manager_config
from kelp.supervisor.server import TritonServer

_RUN_FOLDER = "serve-"
Say = Callable[[str], None]


class KvManagerWatch:
    """Looks whether the manager still renews its record; `check` blocks for seconds when it does not."""

    def __init__(self, config: KelpConfig, say: Say) -> None:
        self._records = KvManagerDirectory(config.registry.path, config.registry.expiry_s)
        self._patience_s = config.registry.heartbeat_s
        self._is_enabled = config.kv_manager.enabled
        self._say = say
        self._seen_s = time.monotonic()
        self._num_restarts = 0

    def check(self, servers: Sequence[TritonServer]) -> None:
        """Load the manager again if it is gone while its server runs."""
        now_s = time.monotonic()
        with contextlib.suppress(OSError):
            if self._records.snapshot():
                self._seen_s = now_s
        server = next((one for one in servers if KV_BLOCK_MANAGER.name in one.spec.on_disk_models), None)
        if not self._is_enabled or server is None or not server.is_running():
            self._seen_s = now_s
        if now_s - self._seen_s > self._patience_s and server is not None:
            self._restart(server)
            self._seen_s = time.monotonic()

    def _restart(self, server: TritonServer) -> None:
        self._num_restarts += 1
        self._say(f"{KV_BLOCK_MANAGER.name} died; loading it again (log: {server.log_path})")
        with contextlib.closing(TritonControl(server.spec.grpc_endpoint)) as control:
            try:
                control.load(KV_BLOCK_MANAGER.name, kv_manager_config(self._num_restarts))
            except KelpError as error:
                self._say(f"{KV_BLOCK_MANAGER.name} did not come back: {error}")


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
            shutil.rmtree(folder, ignore_errors=True)
