"""Which machine and which commit the figures belong to."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
_CPUINFO = Path("/proc/cpuinfo")


def describe_machine() -> str:
    """Cores, CPU model, memory, kernel and Python in one line."""
    memory_gib = psutil.virtual_memory().total / 2**30
    return (
        f"{len(os.sched_getaffinity(0))} cores {_cpu_model()}, {memory_gib:.0f} GiB, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    )


def current_commit() -> str:
    """Short commit id, `-dirty` where files differ from it; `none` outside a repository with commits."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "none"
    return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit


def load_average() -> float:
    """1-minute load average."""
    return os.getloadavg()[0]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_model() -> str:
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.machine()
