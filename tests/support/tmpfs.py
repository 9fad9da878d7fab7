"""Memory file systems with options of their own, where the tests may mount one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted_tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs at `folder`, which is made; skips the test where it may not mount one, or not with these options."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"{options},mode=0700", "kelp-test", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"mounting a tmpfs with {options} is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
