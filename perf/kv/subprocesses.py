"""Running a measuring process: whatever NIXL does to a process that has loaded it stays out of the suite."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from perf.machine import REPOSITORY
from perf.suite import BenchError


def measure(module: str, spec: Any, environment: Mapping[str, str], timeout_s: float) -> str:
    """Run `python -m module` with a spec (a dataclass) as JSON on its stdin; returns the last line that it writes.

    Raises:
        BenchError: It failed, or took too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps(dataclasses.asdict(spec)),
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{module}: not ready after {timeout_s:.0f} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BenchError(f"{module}: exit status {done.returncode}: {reason[:300]}")
    return lines[-1]
