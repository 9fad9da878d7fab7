"""Says which torch build pip is about to fetch, how large it is, and how to choose another one.

Usage: torch_source.py REQUIREMENT [INDEX_URL]. On most indexes `torch` for Linux is the CUDA build, which pulls
gigabytes of NVIDIA libraries onto machines without a GPU; the reader should know before it happens. Runs on the
standard library alone, before anything is installed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_TIMEOUT_S = 20


def _resolve(requirement: str, index: str) -> dict[str, Any]:
    """What pip would install, asked without installing it."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    source = ["--index-url", index] if index else []
    done = subprocess.run(
        [*command, "--report", "-", *source, requirement], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        sys.exit(f"setup: error: {(lines or [f'pip cannot find {requirement}'])[-1]}")
    chosen: dict[str, Any] = json.loads(done.stdout)["install"][0]
    return chosen


def _size_bytes(url: str) -> int:
    """Size of a wheel; 0 when its host does not tell."""
    parts = urllib.parse.urlsplit(url)
    try:
        if parts.scheme == "file":
            return Path(urllib.parse.unquote(parts.path)).stat().st_size
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return int(answer.headers.get("Content-Length") or 0)
    except OSError:
        return 0


def main() -> None:
    """Print one line about the build, and a second one if it does not suit the machine."""
    requirement, index = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    chosen = _resolve(requirement, index)
    url, metadata = chosen["download_info"]["url"], chosen["metadata"]
    cuda_libraries = [name for name in metadata.get("requires_dist", []) if name.startswith(("nvidia-", "cuda-"))]
    size = _size_bytes(url)
    shown = f"{size / 1e6:.0f} MB" if size else "size unknown"
    kind = f"CUDA build, plus {len(cuda_libraries)} NVIDIA packages of about 2-3 GB" if cuda_libraries else "CPU build"
    host = urllib.parse.urlsplit(url).hostname or "a local folder"
    print(f"setup: fetching torch {metadata['version']} from {host} ({shown}, {kind})", flush=True)
    if cuda_libraries and shutil.which("nvidia-smi") is None:
        print(f"setup: no GPU is visible; for the much smaller CPU build: make setup TORCH_INDEX={_CPU_INDEX}")


if __name__ == "__main__":
    main()
