"""Triton's shared-memory regions: enough room before the start, none left after the end."""

from __future__ import annotations

import shutil
from pathlib import Path

from kelp.core.errors import ConfigError

_FOLDER = Path("/dev/shm")
BYTES_PER_MODEL = 16 * 1024 * 1024
"""Region of one Python model at start; Triton's default of 1 MiB grows by copying and never shrinks."""


def require_room(num_models: int) -> None:
    """Refuse to start without room for the models' regions.

    Raises:
        ConfigError: Names what is needed and what there is.
    """
    needed = num_models * BYTES_PER_MODEL
    free = shutil.disk_usage(_FOLDER).free
    if free < needed:
        raise ConfigError(
            f"{_FOLDER}: {free >> 20} MiB free, {num_models} models need {needed >> 20} MiB; "
            "enlarge it (docker run --shm-size, mount -o remount,size=)"
        )


def sweep(prefix: str) -> int:
    """Remove the regions of a server that has ended and return how many there were."""
    left = [path for path in _FOLDER.iterdir() if path.name.startswith(prefix)]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)
