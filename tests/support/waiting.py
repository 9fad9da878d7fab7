"""Waiting for conditions instead of sleeping."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

_POLL_S = 0.001


async def until(predicate: Callable[[], bool], what: str = "the condition", timeout_s: float = 10.0) -> None:
    """Wait on the running loop."""
    deadline_s = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline_s, f"{what} never came true"
        await asyncio.sleep(_POLL_S)


def wait_until(predicate: Callable[[], bool], what: str = "the condition", timeout_s: float = 10.0) -> None:
    """Wait in a thread."""
    deadline_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while not predicate():
        assert time.monotonic() < deadline_s, f"{what} never came true"
        pause.wait(_POLL_S)
