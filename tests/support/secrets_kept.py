"""Where a server's secrets have come to light: its logs, and command lines, which everybody on the host can read."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import psutil

from support.serving import KelpServer


def told_by(server: KelpServer, secrets: Sequence[str]) -> list[str]:
    """Logs and processes that tell one of the secrets; fails if there is nothing to be looked at."""
    texts = {"kelp serve": server.output}
    texts |= {path.name: path.read_text(errors="replace") for path in server.run_folder.glob("*.log")}
    assert len(texts) > 1 and all(texts.values()), f"empty or missing logs: {list(texts)}"
    for process in server.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            texts[f"command line of {process.pid}"] = " ".join(process.cmdline())
    return [name for name, text in texts.items() if any(secret in text for secret in secrets)]
