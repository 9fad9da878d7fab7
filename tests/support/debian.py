"""Programs of Debian that tests use: installed, or unpacked by `scripts/setup.sh test`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

UNPACKED = Path(sys.prefix) / ".kelp" / "debian"


def find_program(name: str) -> str | None:
    """Path of a program, or None."""
    return shutil.which(name) or shutil.which(name, path=str(UNPACKED / "usr" / "bin"))


def find_library(pattern: str) -> Path | None:
    """Path of a file below `/usr/lib`, or None."""
    found = (path for root in (Path("/"), UNPACKED) for path in sorted((root / "usr" / "lib").glob(pattern)))
    return next(found, None)
